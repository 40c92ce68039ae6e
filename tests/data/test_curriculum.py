"""Prompts that teach are drawn more often, by the law that the docstring states; the draws can be resumed."""

import heapq
import json
import math
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch

from rlbench.config.curriculum import CurriculumConfig
from rlbench.data.curriculum import CurriculumStream, largest_keys, signal_chance
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


def many_prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"train/{i}", text="", token_ids=(1,)) for i in range(count)]


def answers_of(prompts: list[Prompt], memory: float, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of about two prompts in three, after one to four visits."""
    found, drawing = {}, random.Random(seed)
    for prompt in drawing.sample(prompts, 2 * len(prompts) // 3):
        right = wrong = 0.0
        for _ in range(drawing.randint(1, 4)):
            num_right = drawing.randint(0, 4)
            right, wrong = memory * right + num_right, memory * wrong + 4 - num_right
        found[prompt.prompt_id] = (right, wrong)
    return found


def draw_one_by_one(
    prompts: list[Prompt], answers: dict[str, tuple[float, float]], config: CurriculumConfig, seed: str, count: int
) -> tuple[list[str], float]:
    """The law, prompt by prompt: ids of the largest keys log(1 - u) / w, and the mean chance that they teach."""

    def chance(right: float, wrong: float) -> float:
        a, b = prior_right + right, config.prior_weight - prior_right + wrong
        all_right = math.prod((a + i) / (a + b + i) for i in range(4))
        return max(0.0, 1.0 - all_right - math.prod((b + i) / (a + b + i) for i in range(4)))

    right, wrong = (math.fsum(column) for column in zip(*answers.values(), strict=True))
    prior_right = config.prior_weight * (right + 1) / (right + wrong + 2)
    chances = [chance(*answers.get(prompt.prompt_id, (0.0, 0.0))) for prompt in prompts]
    generator = random.Random(seed)
    keys = [math.log(1.0 - generator.random()) / max(config.min_weight, found) for found in chances]
    chosen = heapq.nlargest(count, range(len(keys)), key=keys.__getitem__)
    return [prompts[i].prompt_id for i in chosen], math.fsum(chances[i] for i in chosen) / len(chosen)


@pytest.mark.parametrize("memory", [0.5, 0.9])
@pytest.mark.parametrize(("num_prompts", "count"), [(7, 7), (50, 49), (1000, 1), (3000, 64), (3000, 2000)])
def test_a_draw_is_to_the_last_bit_that_of_a_key_for_every_prompt(num_prompts, count, memory):
    prompts = many_prompts(num_prompts)
    config = CurriculumConfig(is_on=True, memory=memory, min_weight=0.01)
    one = CurriculumStream(prompts, seed=3, config=config, group_size=4)
    answers = answers_of(prompts, memory)
    one.restore({**one.state(), "answers": answers})

    for draw in range(3):
        drawn = [prompt.prompt_id for prompt in one.next(count)]
        expected, chance = draw_one_by_one(prompts, answers, config, f"3/curriculum/{draw}", count)
        assert drawn == expected
        assert one.metrics()["curriculum/expected_signal_frac"] == chance
        prompt = prompts[draw]
        one.observe([group(prompt, 1, 0, 0, 0)])
        right, wrong = answers.get(prompt.prompt_id, (0.0, 0.0))
        answers[prompt.prompt_id] = (memory * right + 1, memory * wrong + 3)


@pytest.mark.parametrize("count", [0, 1, 5, 199, 200])
def test_the_largest_keys_are_found_whatever_the_numbers(count):
    uniform = np.random.default_rng(0).random(200)
    uniform[:4], uniform[4:9] = 0.0, 1.0 - 2.0**-53  # as the generator may give
    weights = np.full(200, 1e-9)
    weights[100:] = np.random.default_rng(1).random(100) + 1e-3
    keys = [math.log(1.0 - u) / w for u, w in zip(uniform.tolist(), weights.tolist(), strict=True)]

    assert largest_keys(uniform, weights, count) == heapq.nlargest(count, range(200), key=keys.__getitem__)


def test_a_key_that_is_near_its_bound_goes_before_one_that_is_far_below_its_own():
    uniform, weights = np.array([0.9, 0.01, 0.9999]), np.array([1.0, 0.01, 1.09])
    # bounds -0.9, -1.0 and -0.92, keys -2.3, -1.005 and -8.4

    assert largest_keys(uniform, weights, 1) == [1]


def test_a_draw_from_many_prompts_costs_little():
    prompts = many_prompts(200_000)
    config = CurriculumConfig(is_on=True)
    one = CurriculumStream(prompts, seed=0, config=config, group_size=4)
    answers = answers_of(prompts, 0.5)
    one.restore({**one.state(), "answers": answers})

    def seconds(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    fast = min(seconds(lambda: one.next(64)) for _ in range(5))
    slow = min(seconds(lambda: draw_one_by_one(prompts, answers, config, "0", 64)) for _ in range(2))

    assert fast < slow / 20, (fast, slow)
