"""Checkpoints: complete, checked, restored bit for bit."""

import functools
import json
import random
import resource
import shutil

import pytest
import torch

from rlbench.config.optim import GaloreConfig
from rlbench.config.schema import AlgorithmConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.tracking.errors import TrackingError
from rlbench.training.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
    set_aside_later,
)
from rlbench.training.optim import make_optimizer
from rlbench.training.step import train_step
from tests.training.test_step import make_policy, make_samples


def make_update(policy, optimizer, seed: int) -> None:
    batches = pack(make_samples(seed), tokens_per_microbatch=1000, device="cpu")
    assert train_step(policy, batches, optimizer, AlgorithmConfig(), temperature=1.0, max_grad_norm=1.0).is_applied


def start(base, name: str = "adamw"):
    policy = make_policy(base)
    galore = GaloreConfig(rank=2, interval=3, threshold=0.01) if "galore" in name else GaloreConfig()
    return policy, make_optimizer(policy.parameters(), OptimConfig(lr=0.01, name=name, galore=galore))


def save(folder, policy, optimizer, step: int, keep_last: int = 2):
    return save_checkpoint(folder, policy, optimizer, {"step": step, "n": 7}, base_name="tiny", keep_last=keep_last)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon", "galore", "galore_8bit"])
def test_training_goes_on_bit_for_bit_after_a_restore(tiny_base, tmp_path, name, monkeypatch):
    if name.endswith("8bit"):
        optim = pytest.importorskip("bitsandbytes.optim.adamw")
        # the tiny model's matrices have fewer numbers than bitsandbytes would quantise the moments of
        monkeypatch.setattr(optim, "AdamW8bit", functools.partial(optim.AdamW8bit, min_8bit_size=16))
    policy, optimizer = start(tiny_base, name)
    for seed in range(5):
        make_update(policy, optimizer, seed)
        if seed == 1:
            save(tmp_path, policy, optimizer, 2)
    restored, its_optimizer = start(tiny_base, name)
    checkpoint, _ = find_checkpoint(tmp_path)
    restore(checkpoint, restored, its_optimizer)
    for seed in (2, 3, 4):
        make_update(restored, its_optimizer, seed)

    assert restored.adapter().fingerprint() == policy.adapter().fingerprint()
    assert checkpoint.state == {"step": 2, "n": 7}
    moments = {value.dtype for state in optimizer.state.values() for key, value in state.items() if key == "state1"}
    assert moments == ({torch.uint8} if name.endswith("8bit") else set())


def test_only_the_newest_are_kept(tiny_base, tmp_path):
    policy, optimizer = start(tiny_base)
    for step in (1, 2, 3):
        save(tmp_path, policy, optimizer, step)

    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_the_newest_is_that_of_the_highest_step_however_long_its_name(tiny_base, tmp_path):
    policy, optimizer = start(tiny_base)
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, policy, optimizer, step)

    assert find_checkpoint(tmp_path)[0].step == 1_000_000
    assert {f.name for f in (tmp_path / "checkpoints").iterdir()} == {"step-999999", "step-1000000"}


def test_named_steps_stay_besides_the_newest(tiny_base, tmp_path):
    policy, optimizer = start(tiny_base)
    for step in (1, 2, 3):
        save_checkpoint(
            tmp_path, policy, optimizer, {"step": step}, base_name="tiny", keep_last=1, keep_steps=[1]
        )  # fmt: skip

    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]


@pytest.fixture
def two_checkpoints(tiny_base, tmp_path):
    policy, optimizer = start(tiny_base)
    make_update(policy, optimizer, 0)
    return [save(tmp_path, policy, optimizer, step) for step in (1, 2)]


def test_who_may_read_the_state_may_read_the_weights(two_checkpoints, tiny_base, tmp_path):
    policy = make_policy(tiny_base)
    policy.save_adapter(tmp_path / "result", "tiny")
    files = [*two_checkpoints[1].rglob("*.safetensors"), *(tmp_path / "result").rglob("*.safetensors")]
    written = tmp_path / "written"
    written.touch()

    assert len(files) == 3 and {file.stat().st_mode for file in files} == {written.stat().st_mode}


DAMAGES = {
    "a flipped bit": lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
    "cut short": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "emptied": lambda f: f.write_bytes(b""),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(two_checkpoints, tmp_path, damage, name):
    older, newer = two_checkpoints
    DAMAGES[damage](newer / name)

    checkpoint, damaged = find_checkpoint(tmp_path)

    assert checkpoint.folder == older
    assert len(damaged) == 1 and name in damaged[0]
    with pytest.raises(ValueError, match=f"is damaged: {name}"):
        read_checkpoint(newer)


def test_one_that_was_set_aside_counts_until_its_successor_has_its_name(two_checkpoints, tiny_base, tmp_path):
    """Killed while the same step was saved again, between the two renames; and in the save before."""
    older, newer = two_checkpoints
    shutil.rmtree(older)
    aside = newer.rename(newer.with_name(f".{newer.name}.7.before"))
    newer.with_name(f".{newer.name}.7").mkdir()

    assert has_checkpoint(tmp_path) and find_checkpoint(tmp_path)[0].folder == aside

    policy, optimizer = start(tiny_base)
    save(tmp_path, policy, optimizer, 3, keep_last=1)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_checkpoint_is_gone_for_readers_before_its_first_file_is(two_checkpoints, tiny_base, tmp_path, monkeypatch):
    policy, optimizer = start(tiny_base)
    seen = []
    remove = shutil.rmtree

    def watched(folder, **options):
        if folder.exists():
            seen.append(folder.name)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(tmp_path, policy, optimizer, 3)
    assert seen == [".step-000001.gone"]


def test_a_run_that_goes_on_from_an_older_one_keeps_none_that_is_later(two_checkpoints, tiny_base, tmp_path):
    """Else a kill would make it go on from there, without the lines of the steps between."""
    two_checkpoints[1].joinpath("state.json").unlink()

    assert set_aside_later(tmp_path, 1) == ["step-000002 was damaged and is removed"]
    policy, optimizer = start(tiny_base)
    save(tmp_path, policy, optimizer, 1, keep_last=1)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_whole_checkpoints_of_later_steps_are_moved_and_kept(two_checkpoints, tiny_base, tmp_path):
    policy, optimizer = start(tiny_base)
    for _ in range(2):  # it goes back twice
        (said,) = set_aside_later(tmp_path, 1)
        assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
        save(tmp_path, policy, optimizer, 2)
    save(tmp_path, policy, optimizer, 1_000_000)
    set_aside_later(tmp_path, 999_999)

    kept = {folder.name for folder in (tmp_path / "replaced_checkpoints").iterdir()}
    assert kept == {"step-000002", "step-000002-2", "step-1000000"}
    assert said == f"step-000002 is now {tmp_path / 'replaced_checkpoints' / 'step-000002-2'}"
    assert find_checkpoint(tmp_path / "replaced_checkpoints" / "step-000002")[0].step == 2


def test_a_folder_without_a_valid_checkpoint_is_a_clear_error(two_checkpoints, tmp_path):
    for folder in two_checkpoints:
        (folder / "manifest.json").write_text("{")

    with pytest.raises(ValueError, match="no valid checkpoint is there: .*manifest.json"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="expected a run's folder or a checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_another_format_is_refused(two_checkpoints):
    manifest = json.loads((two_checkpoints[1] / "manifest.json").read_text())
    (two_checkpoints[1] / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))

    with pytest.raises(ValueError, match="checkpoint format 99, expected 1"):
        read_checkpoint(two_checkpoints[1])


def test_a_failed_save_leaves_no_trace_and_keeps_the_old(two_checkpoints, tiny_base, tmp_path, monkeypatch):
    policy, optimizer = start(tiny_base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlbench.training.checkpoint.save_file", full)
    with pytest.raises(Exception, match="No space left on device"):
        save(tmp_path, policy, optimizer, 3)

    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert find_checkpoint(tmp_path)[0].step == 2


def test_an_adapter_of_another_rank_is_refused(two_checkpoints, tiny_base):
    from rlbench.config.schema import LoraConfig
    from rlbench.models.policy import Policy

    policy = Policy(tiny_base, LoraConfig(rank=8), seed=0)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-4))

    with pytest.raises(ValueError, match=r"expected equal lora.\* settings"):
        restore(read_checkpoint(two_checkpoints[0]), policy, optimizer)
    assert torch.isfinite(next(iter(policy.parameters()))).all()


def test_a_full_disk_is_one_sentence_and_keeps_the_old(two_checkpoints, tiny_base, tmp_path):
    """The writers' own errors, safetensors' among them, under a limit on the size of files."""
    policy, optimizer = start(tiny_base)
    make_update(policy, optimizer, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TrackingError, match="cannot save a checkpoint to .*step-000003: .*File too large"):
            save(tmp_path, policy, optimizer, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert find_checkpoint(tmp_path)[0].step == 2


def test_any_single_byte_that_changes_is_noticed(two_checkpoints):
    """Every byte of small files, the manifest among them; 100 random ones of the others."""
    folder, draw = two_checkpoints[1], random.Random(0)
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        kept = file.read_bytes()
        places = range(len(kept)) if len(kept) < 2000 else draw.sample(range(len(kept)), 100)
        for place in places:
            changed = bytearray(kept)
            changed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(ValueError):
                read_checkpoint(folder)
        file.write_bytes(kept)
    assert read_checkpoint(folder).step == 2
