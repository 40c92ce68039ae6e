"""What `explain` says of a run is what the run writes down."""

import json

import pytest
import yaml

from rlbench.commands.explain import explained_runs
from rlbench.config.compose import leaves
from tests.loops.conftest import run


def check_same(run_folder, explained) -> None:
    """All values of config.yaml, all of derived.json with their reasons."""
    recorded = dict(leaves(yaml.safe_load((run_folder / "config.yaml").read_text())))
    said = {s.key: s for s in explained.settings}
    of_the_chain = {"lora.init_from"} if explained.title else set()
    assert said.keys() == recorded.keys()
    assert {k: s.value for k, s in said.items() if k not in of_the_chain} == {
        k: v for k, v in recorded.items() if k not in of_the_chain
    }
    reasons = json.loads((run_folder / "derived.json").read_text())
    assert {k: s.reason for k, s in said.items() if s.reason and k not in of_the_chain} == {
        k: entry["reason"] for k, entry in reasons.items()
    }


@pytest.mark.parametrize("extra", [[], ["algorithm=ppo", "algorithm.num_minibatches=1"]], ids=["grpo", "ppo"])
def test_an_online_run(extra, tiny_overrides, tmp_path):
    overrides = [*extra, *tiny_overrides, "training.num_steps=1"]
    done = run(*overrides, "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    check_same(tmp_path / "run", *explained_runs(overrides)[1])


def test_a_chain(tiny_overrides, tmp_path):
    shared = [o for o in tiny_overrides if not o.startswith(("optim.lr=", "evaluation.", "name="))]
    overrides = ["+exp=chain_gsm8k", *shared, "training.num_steps=1", "evaluation.num_prompts=0"]
    done = run(*overrides, "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    for folder, explained in zip(("1_sft", "2_grpo", "3_dpo"), explained_runs(overrides)[1], strict=True):
        check_same(tmp_path / "run" / folder, explained)
        init_from = yaml.safe_load((tmp_path / "run" / folder / "config.yaml").read_text())["lora"]["init_from"]
        said = next(s.value for s in explained.settings if s.key == "lora.init_from")
        assert init_from == (said and str(tmp_path / "run" / said))
