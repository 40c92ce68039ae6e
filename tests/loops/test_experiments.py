"""Every file of conf/exp runs: composition, rewards, and a step of its loop, on a tiny model in this process."""

import json

import pytest

from rlbench.commands.train import run_training
from rlbench.config.chain import stage_configs
from rlbench.config.compose import group_choices, to_run_config
from tests.architecture.test_layout import compose
from tests.loops.conftest import ENVIRONMENT, ROOT
from tests.tiny import save_tiny_model

# What needs more than rows and a tiny model runs whole in a test of its own.
RUN_ELSEWHERE = {
    "distillation_gsm8k": "test_distillation_runs.py",  # a teacher
    "grpo_code": "test_code_runs.py",  # a sandbox
    "grpo_reward_model_gsm8k": "test_reward_model_runs.py",  # a trained reward model
}
SMALL = ["model.dtype=float32", "hardware=cpu", "hardware.num_threads=1", "tracking=local"]
OWN_ROWS = dict.fromkeys(["grpo_countdown", "grpo_reasoning_gym"], ["data.limit=8"])  # made by reasoning-gym
COLUMNS = ["data.prompt_column=question", "data.answer_column=answer"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) + "\n" for a in range(4) for b in range(4))
    )
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Its context holds the files' own prompts, a token a character."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), context=1024))


@pytest.mark.parametrize("name", [name for name in group_choices("exp") if name not in RUN_ELSEWHERE])
def test_a_step_of_it_runs(name, rows, model, tmp_path, monkeypatch):
    for key in ("PYTHONPATH", "HF_HUB_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    data = OWN_ROWS.get(name, [f"data.path={rows}", *COLUMNS])
    config = to_run_config(compose(f"+exp={name}", f"model.path={model}", *SMALL, *data))
    stages = stage_configs(config) if config.chain else [config]
    previous = None
    for index, stage in enumerate(stages):
        folder = tmp_path / str(index)
        folder.mkdir()
        stage.training.num_steps, stage.evaluation.num_prompts = 1, 2
        stage.lora.init_from = previous
        if stage.stage == "rl":
            stage.engine.kind, stage.engine.max_num_seqs, stage.rewards.num_workers = "hf", 16, 1
            stage.algorithm.prompts_per_step, stage.algorithm.group_size, stage.sampling.max_tokens = 4, 2, 6
        assert run_training(stage, [], folder, is_in_chain=True) == 0
        previous = str(folder)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any("loss/total" in step or step.get("optim/is_skipped") == 1.0 for step in steps)
        is_full = stage.training.parameters == "full"
        assert (folder / ("model/model.safetensors" if is_full else "adapter/adapter_model.safetensors")).is_file()


@pytest.mark.parametrize("name", [name for name in group_choices("preference") if name != "none"])
def test_a_step_with_every_choice_of_preference_losses_runs(name, rows, model, tmp_path, monkeypatch):
    for key in ("PYTHONPATH", "HF_HUB_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    options = [f"preference={name}", "training.num_steps=2", "evaluation.num_prompts=2", "preference.pairs_per_step=4"]
    config = to_run_config(
        compose("+exp=dpo_gsm8k", *options, f"model.path={model}", *SMALL, f"data.path={rows}", *COLUMNS)
    )

    assert run_training(config, [], tmp_path, is_in_chain=True) == 0
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss/preference"] for step in steps if step["phase"] == "train"]
    assert len(losses) == 2 and losses[0] != losses[1]


@pytest.mark.parametrize(("name", "file"), RUN_ELSEWHERE.items())
def test_the_others_have_tests_of_their_own(name, file):
    assert f"+exp={name}" in (ROOT / "tests" / "loops" / file).read_text()
