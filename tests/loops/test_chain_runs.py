"""SFT -> GRPO -> DPO in one call on the tiny model: each starts from the last's adapter, a stopped chain goes on."""

import hashlib
import json
import shlex
import signal
from pathlib import Path

import pytest
import yaml

from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run, run_afresh, start
from tests.loops.test_rl_runs import wait_for
from tests.loops.test_user_errors import check

FOLDERS = ["1_sft", "2_grpo", "3_dpo"]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def overrides(tiny_overrides) -> list[str]:
    shared = [o for o in tiny_overrides if not o.startswith(("optim.lr=", "evaluation.", "name="))]
    return [
        "+exp=chain_gsm8k", *shared, f"training.num_steps={NUM_STEPS}", "evaluation.num_prompts=0",
        "checkpoint.every_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run_afresh(*overrides, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "run"


def digest(run_folder: Path) -> str:
    return hashlib.sha256((run_folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_each_stage_starts_from_the_last_ones_adapter(finished):
    folders = [finished[1] / name for name in FOLDERS]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]

    assert [config["stage"] for config in configs] == ["sft", "rl", "preference"]
    assert [config["lora"]["init_from"] for config in configs] == [None, *map(str, folders[:2])]
    assert len({digest(folder) for folder in folders}) == 3
    recorded = json.loads((finished[1] / "chain.json").read_text())["finished"]
    assert [entry["adapter_sha256"] for entry in recorded] == [digest(folder) for folder in folders]


def test_the_summary_names_steps_adapter_and_report_of_each_stage(finished):
    text = finished[0].stdout.partition("Chain of 3 stages finished")[2]

    for name in FOLDERS:
        assert f"Stage {name.replace('_', ', ')}: {NUM_STEPS} steps" in text
        assert str(finished[1] / name / "report.html") in text and str(finished[1] / name / "adapter") in text
    assert "train on" not in finished[0].stdout


def test_the_first_rollouts_come_from_the_adapter_of_supervised_fine_tuning(finished):
    import pyarrow.parquet as parquet

    first = parquet.read_table(finished[1] / "2_grpo" / "rollouts" / "step-000001.parquet").to_pylist()
    sft = find_checkpoint(finished[1] / "1_sft")[0].state["adapter_fingerprint"]
    assert {row["adapter_fingerprint"] for row in first} == {sft}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_chain_stopped_in_the_second_stage_ends_as_if_it_had_not_been(finished, overrides, tmp_path, how):
    process = start(*overrides, "hydra.run.dir=run", folder=tmp_path)
    wait_for((tmp_path / "run" / "2_grpo" / "checkpoints" / "step-000001" / "manifest.json").exists, process)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the chain stopped in stage 2 of 3, grpo; to go on: python -m rlbench +exp=chain_gsm8k " in output
        overrides = shlex.split(output.split("to go on: python -m rlbench ")[1].splitlines()[0])
    assert not (tmp_path / "run" / "3_dpo").exists()
    first_started = (tmp_path / "run" / "1_sft" / "metrics.jsonl").stat().st_mtime_ns

    resumed = run(*overrides, *([] if how == signal.SIGINT else ["resume=run"]), folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (tmp_path / "run" / "1_sft" / "metrics.jsonl").stat().st_mtime_ns == first_started
    assert [digest(tmp_path / "run" / name) for name in FOLDERS] == [digest(finished[1] / name) for name in FOLDERS]


def test_a_finished_chain_trains_nothing_and_a_changed_adapter_is_noticed(finished, overrides, tmp_path):
    again = run(*overrides, "resume=auto", f"hydra.run.dir={finished[1].parent}/new", folder=tmp_path)

    assert again.returncode == 0 and "Chain of 3 stages finished" in again.stdout, again.stdout + again.stderr
    assert "loading the model" not in again.stdout and not (finished[1].parent / "new").exists()
    adapter = finished[1] / "2_grpo" / "adapter" / "adapter_model.safetensors"
    kept = adapter.read_bytes()
    adapter.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        changed = run(*overrides, f"resume={finished[1]}/3_dpo", folder=tmp_path)
        check(changed, "2_grpo/adapter is missing or has changed since its stage finished")
    finally:
        adapter.write_bytes(kept)


WRONG = {
    "a value": ("preference.losses=[dpoo]", "stage 'dpo' (chain.2): preference.losses"),
    "a file": ("data.path=nowhere.jsonl", "stage 'dpo' (chain.2): data.path is nowhere.jsonl"),
}


@pytest.mark.parametrize(("override", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_third_stage_stops_the_chain_before_the_first(overrides, tmp_path, override, sentence):
    stage = f'chain.2.overrides=["stage=preference","{override}"]'
    done = run(*overrides, stage, "hydra.run.dir=run", folder=tmp_path)

    check(done, sentence)
    assert not (tmp_path / "run").exists()


def test_a_wrong_reward_shows_before_the_first_stage(overrides, tmp_path):
    done = run(
        *overrides, "rewards.components.share.path=rlbench_rewards.nothing", "hydra.run.dir=run", folder=tmp_path
    )

    check(done, "stage 'grpo' (chain.1): ")
    assert not (tmp_path / "run").exists()


def test_commands_of_one_run_and_folders_without_a_chain_are_refused(overrides, tmp_path):
    check(run("plan", *overrides, folder=tmp_path), "this command takes one run, but chain has 3 stages")
    check(run(*overrides, "resume=nowhere", folder=tmp_path), "resume is nowhere, but no chain.json is there")
