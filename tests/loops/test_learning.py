"""Algorithms on a task with a known optimum: from a mean reward below 0.4 to above 0.9, on one thread.

The model is random; supervised fine-tuning on answers that are right here and there comes first, as in a chain.
"""

import json
import random

import pytest

from rlbench.commands.train import run_training
from rlbench.config.compose import to_run_config
from rlbench.tracking.jsonl import read_metrics
from tests.architecture.test_layout import compose
from tests.loops.conftest import ENVIRONMENT
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)

OPTIONS = {
    "grpo": [],
    "rloo": [],
    "reinforce_plus_plus": [],
    "ppo": ["algorithm.critic.lr=0.003"],
    "online_dpo": ["optim.lr=0.01"],
}


@pytest.fixture(scope="module")
def warm(tiny_folder, tmp_path_factory):
    """A run of supervised fine-tuning on lower-case letters, a sixth of them `a`, and the tiny model's first loss."""
    folder = tmp_path_factory.mktemp("sft")
    draw = random.Random(0)
    answers = ["".join(draw.choice("aabcdefghijk") for _ in range(10)) for _ in range(40)]
    rows = [{"question": f"{i % 8}+{i // 8}", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = to_run_config(
        compose(
            "+exp=sft_gsm8k", f"model.path={tiny_folder}", "model.dtype=float32", f"data.path={folder / 'rows.jsonl'}",
            "data.prompt_column=question", "data.answer_column=answer", "data.system_prompt=null", "data.examples=[]",
            "sft.rows_per_step=8", "training.num_steps=16", "evaluation.num_prompts=0", "optim.lr=0.02",
            "hardware=cpu", "hardware.num_threads=1", "tracking=local",
        )
    )  # fmt: skip
    (folder / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "WANDB_MODE"):
            patch.setenv(name, ENVIRONMENT[name])
        assert run_training(config, [], folder / "run", is_in_chain=True) == 0
    return folder / "run"


def test_fine_tuning_comes_first(warm):
    losses = [line["loss/nll"] for line in read_metrics(warm / "metrics.jsonl", "train")]

    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("algorithm", OPTIONS)
def test_the_reward_rises_from_below_04_to_above_09(warm, short, tmp_path, algorithm):  # noqa: F811
    options = [f"algorithm={algorithm}", f"lora.init_from={warm}", "training.num_steps=40", *OPTIONS[algorithm]]
    history = finish(start(short, tmp_path / "run", *options))
    rewards = [line["reward/mean"] for line in history]

    assert 0.08 < rewards[0] < 0.4  # of the random model: 0.01
    assert sum(rewards[-3:]) / 3 > 0.9, rewards
