"""A run whose rewards are computed during generation is the same run."""

from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_rollouts
from tests.loops.conftest import run
from tests.loops.test_rl_runs import comparable


def test_overlap_changes_no_bit_of_a_run_and_shows_what_it_hides(tiny_overrides, tmp_path):
    for overlap in ("true", "false"):
        changed = [f"rewards.overlap={overlap}", f"hydra.run.dir=overlap_{overlap}"]
        done = run(*tiny_overrides, "training.num_steps=3", *changed, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    with_overlap, without = tmp_path / "overlap_true", tmp_path / "overlap_false"

    name = "adapter/adapter_model.safetensors"
    assert (with_overlap / name).read_bytes() == (without / name).read_bytes()
    assert comparable(with_overlap) == comparable(without)
    for step in (1, 2, 3):
        file = f"rollouts/step-{step:06d}.parquet"
        assert read_rollouts(with_overlap / file) == read_rollouts(without / file)
    hidden = [[line["reward_pool/overlapped_s"] for line in read_metrics(folder / "metrics.jsonl", "train")]
              for folder in (with_overlap, without)]  # fmt: skip
    assert min(hidden[0]) > 0 and hidden[1] == [0.0] * 3
