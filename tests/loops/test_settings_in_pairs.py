"""Settings two at a time: every two values are refused in a sentence, or are in a run that trains and resumes.

`ROWS` is a covering array of pairs, in the order of `SETTINGS`; what breaks only with two settings together, breaks
here.
"""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from rlbench.config.compose import config_folder, register_schema, to_run_config
from rlbench.loops.rl import RlLoop
from rlbench.training.checkpoint import find_checkpoint
from rlbench.training.optimizer_state import state_tensors
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)

NUM_STEPS = 2
SETTINGS: dict[str, dict[str, list[str]]] = {
    "algorithm": {name: [f"algorithm={name}"] for name in ("grpo", "gspo", "ppo", "online_dpo")},
    "kl": {
        "none": ["algorithm.kl_coef=0"],
        "loss": ["algorithm.kl_coef=0.05", "algorithm.kl_in=loss"],
        "reward": ["algorithm.kl_coef=0.05", "algorithm.kl_in=reward", "algorithm.reference_refresh_steps=1"],
    },
    "updates": {
        "one": ["algorithm.num_updates=1", "algorithm.num_minibatches=1"],
        "four": ["algorithm.num_updates=4", "algorithm.num_minibatches=2"],
    },
    "sampling": {
        "plain": [],
        "penalty": ["sampling.presence_penalty=0.5"],
        "truncated": ["sampling.top_k=20", "algorithm.support=sampler"],
    },
    "memory": {
        "none": [],
        "replay": ["algorithm.replay.is_on=true"],
        "curriculum": ["algorithm.curriculum.is_on=true"],
    },
    "groups": {
        "all": [],
        "refilled": ["algorithm.max_refills=2"],
        "masked": ["algorithm.mask_truncated=true", "algorithm.overlong_buffer_tokens=6"],
    },
    "weights": {
        "lora": [],
        "fp8": ["model.quantization=fp8", "model.dtype=bfloat16"],
        "full": ["training.parameters=full", "optim=galore_8bit", "optim.galore.rank=8", "optim.lr=0.003"],
    },
    "packing": {"wide": [], "narrow": ["training.tokens_per_microbatch=60", "training.recompute=full"]},
}
ROWS = [
    "grpo loss four plain none all full wide",
    "gspo reward one penalty none masked lora narrow",
    "ppo none four truncated curriculum refilled fp8 narrow",
    "grpo none one plain replay masked fp8 wide",
    "online_dpo none four penalty curriculum all lora wide",
    "grpo loss one plain curriculum refilled lora narrow",
    "gspo none four penalty replay refilled full wide",
    "ppo reward one plain none all fp8 wide",
    "gspo none one truncated curriculum all full narrow",
    "ppo loss four penalty curriculum masked fp8 wide",
    "online_dpo none one plain none refilled full narrow",
    "grpo none four truncated none masked full wide",
    "grpo reward four penalty curriculum refilled lora wide",
    "gspo none one plain replay all fp8 narrow",
    "ppo none one truncated none refilled lora wide",
    "online_dpo none four plain curriculum masked fp8 wide",
    "gspo none four plain replay masked lora wide",
    "gspo loss four penalty curriculum masked full wide",
]
TASK = [
    f"training.num_steps={NUM_STEPS}",
    "checkpoint.every_steps=1",
    "data.limit=4",  # so that prompts return, which replay needs
    "sampling.stop_token_ids=[60,61,62,63,64,65,66,67,68,69,70,71]",  # so that not all completions are truncated
    "+rewards.components.lowercase={path:tests.loops.letter_reward.share_of_lowercase}",  # every group has a signal
]


def chosen(row: str) -> list[tuple[str, str]]:
    return list(zip(SETTINGS, row.split(), strict=True))


def overrides_of(row: str) -> list[str]:
    return [override for name, value in chosen(row) for override in SETTINGS[name][value]]


def refusal(overrides: list[str]) -> str:
    """The sentence with which the settings are refused, "" if they are not."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = compose("config", overrides=overrides)
    try:
        to_run_config(composed)
    except ValueError as error:
        return str(error)
    return ""


def test_every_two_values_are_in_a_run_or_refused():
    register_schema()
    covered = {frozenset(pair) for row in ROWS for pair in combinations(chosen(row), 2)}
    values = [(name, value) for name in SETTINGS for value in SETTINGS[name]]

    num_refused = 0
    for one, other in combinations(values, 2):
        if one[0] == other[0] or frozenset([one, other]) in covered:
            continue
        sentence = refusal([o for name, value in (one, other) for o in SETTINGS[name][value]])
        assert "algorithm." in sentence and "; expected " in sentence, (one, other)
        num_refused += 1
    assert num_refused == 12


def shown(loop: RlLoop) -> dict[str, float]:
    """Metrics of the last step without what depends on the clock, and the proof that every process begins with."""
    last = loop.history[-1]
    left_out = ("time/", "tokens/", "identity/", "memory/", "reward_pool/")
    return {key: value for key, value in last.items() if not key.startswith(left_out) and not key.endswith("_gib")}


def tensors(loop: RlLoop) -> dict[str, torch.Tensor]:
    """All that is trained, and the optimizers' states."""
    parts = loop.parts
    trained = {"policy": (parts.policy, parts.optimizer), "critic": (parts.critic, parts.critic_optimizer)}
    found = {}
    for part, (model, optimizer) in trained.items():
        if model is None or optimizer is None:
            continue
        named = model.named_parameters()
        found |= {f"{part} {name}": parameter.detach() for name, parameter in named}
        found |= {f"{part} {name}": value for name, value in state_tensors(named, optimizer).items()}
    return found


@pytest.mark.parametrize("row", ROWS)
def test_it_trains_with_finite_numbers_and_resumes_bit_for_bit(short, tmp_path, row):  # noqa: F811
    options = [*TASK, *overrides_of(row)]
    whole = start(short, tmp_path / "whole", *options)
    history = finish(whole)

    assert len(history) == NUM_STEPS and not any(line["optim/is_skipped"] for line in history)
    numbers = [(key, value) for line in history for key, value in line.items() if isinstance(value, float)]
    assert all(math.isfinite(value) for _, value in numbers), [n for n in numbers if not math.isfinite(n[1])]

    resumed = start(short, tmp_path / "resumed", *options)
    resumed.resume(find_checkpoint(step_folder(tmp_path / "whole", 1))[0])
    finish(resumed)

    assert shown(resumed) == shown(whole)
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:06d}"
