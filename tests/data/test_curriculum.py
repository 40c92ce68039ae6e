"""Prompts that teach are drawn more often, by the law that the docstring states; the draws can be resumed."""

import json
from collections import Counter

import pytest
import torch

from rlbench.config.curriculum import CurriculumConfig
from rlbench.data.curriculum import CurriculumStream, signal_chance
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup

PROMPTS = [Prompt(prompt_id=f"train/{i}", text="", token_ids=(i,)) for i in range(12)]


def stream(seed=0, **options) -> CurriculumStream:
    return CurriculumStream(PROMPTS, seed=seed, config=CurriculumConfig(is_on=True, **options), group_size=4)


def group(prompt: Prompt, *values: float | None) -> RolloutGroup:
    completion = Completion(
        token_ids=(2,), sampling_logprobs=(-1.0,), finish_reason="stop", seed=0, policy_version=0,
        adapter_fingerprint="base",
    )  # fmt: skip
    rollouts = (
        Rollout(
            rollout_id=f"0/{prompt.prompt_id}/{i}", prompt=prompt, completion=completion, completion_text="",
            sample_index=i, reward=value,
            components={
                "accuracy": RewardComponent(status="error" if value is None else "value", value=value, weight=1.0)
            },
        )
        for i, value in enumerate(values)
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


@pytest.mark.parametrize(("right", "wrong", "size"), [(1, 1, 2), (0.3, 2.7, 8), (5, 0.5, 4), (40, 3, 16)])
def test_the_chance_is_the_integral_over_the_rate(right, wrong, size):
    rates = torch.distributions.Beta(torch.tensor(float(right)).double(), torch.tensor(float(wrong)).double())
    torch.manual_seed(0)
    p = rates.sample((2_000_000,))
    expected = 1 - (p**size).mean() - ((1 - p) ** size).mean()

    assert signal_chance(right, wrong, size) == pytest.approx(float(expected), abs=2e-3)


def test_one_answer_never_teaches():
    assert signal_chance(3, 4, 1) == pytest.approx(0.0)


def test_prompts_of_middle_difficulty_are_drawn_most_and_none_is_forgotten():
    drawn = Counter()
    for seed in range(400):
        one = stream(seed, memory=1.0)
        for prompt in PROMPTS[:8]:
            values = {0: (1, 1, 1, 1), 1: (1, 0, 1, 0)}.get(prompt.token_ids[0] // 4, (0, 0, 0, 0))
            for _ in range(5):
                one.observe([group(prompt, *values)])
        drawn.update(prompt.token_ids[0] // 4 for prompt in one.next(3))

    solved, middle, unmeasured = drawn[0], drawn[1], drawn[2]
    assert middle > 1.2 * unmeasured > 2 * solved > 0, drawn


def test_the_prior_is_the_rate_of_all_prompts():
    one = stream(prior_weight=4.0)
    one.observe([group(prompt, 0, 0, 0, 1) for prompt in PROMPTS[:8]])  # (8 + 1) / (32 + 2) right
    rate = 9 / 34

    one.next(12)

    own = signal_chance(4 * rate + 1, 4 * (1 - rate) + 3, 4)
    other = signal_chance(4 * rate, 4 * (1 - rate), 4)
    assert one.metrics()["curriculum/expected_signal_frac"] == pytest.approx((8 * own + 4 * other) / 12)
    assert one.metrics()["curriculum/measured_frac"] == pytest.approx(8 / 12)


def test_older_answers_count_for_less_and_broken_verifiers_for_nothing():
    one = stream(memory=0.5)
    one.observe([group(PROMPTS[0], 1, 1, 0, 0)])
    one.observe([group(PROMPTS[0], 0, 0, None, 0.5)])  # half right is wrong
    one.observe([group(PROMPTS[1], None, None)])

    assert one.state()["answers"] == {"train/0": (1.0, 4.0)}


def test_a_step_repeats_no_prompt_and_all_are_possible():
    one = stream()
    assert len({prompt.prompt_id for prompt in one.next(12)}) == 12
    assert len(one.next(50)) == 12


def test_a_restored_stream_draws_what_the_other_draws():
    one, other = stream(seed=5), stream(seed=5)
    for prompt in one.next(4):
        one.observe([group(prompt, 1, 0, 0, 0)])

    other.restore(json.loads(json.dumps(one.state())))

    assert [[p.prompt_id for p in one.next(5)] for _ in range(4)] == [
        [p.prompt_id for p in other.next(5)] for _ in range(4)
    ]
