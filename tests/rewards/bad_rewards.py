"""Rewards that misbehave, for the pool's tests."""

import asyncio
import math
import os
import time
from pathlib import Path

import numpy as np

from rlbench_rewards import RewardOutput
from rlbench_rewards.contract import UnitCase


def length(sample):
    return RewardOutput(value=float(len(sample.completion)))


def trl_style(completions, answer, **columns):
    return [1.0 if completion == a else 0.0 for completion, a in zip(completions, answer, strict=True)]


def trl_wrong_length(completions, **columns):
    return [1.0, 0.0]


def misbehave(sample):
    """Does what the completion says."""
    return ACTIONS[sample.completion](sample)


def die_once(sample):
    marker = Path(sample.columns["marker"])
    if not marker.exists():
        marker.touch()
        os._exit(7)
    return RewardOutput(value=1.0)


def fail_twice(sample):
    """Raises in the first two calls."""
    marker = Path(sample.columns["marker"])
    num_calls = len(marker.read_text()) if marker.exists() else 0
    marker.write_text("x" * (num_calls + 1))
    if num_calls < 2:
        raise OSError("not yet")
    return RewardOutput(value=1.0)


def count_and_die(sample):
    """Leaves a mark for each call, then ends its process."""
    with open(sample.columns["marker"], "a") as file:
        file.write("x")
    os._exit(9)


def slow(sample):
    time.sleep(0.05)
    return RewardOutput(value=1.0)


def slower(sample):
    time.sleep(0.15)
    return RewardOutput(value=1.0)


async def wait_a_little(sample):
    await asyncio.sleep(0.5)
    return RewardOutput(value=float(len(sample.completion)))


async def trl_async(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


def trl_batch_size(completions, prompts, **columns):
    """The number of completions that came together."""
    return [float(len(completions))] * len(completions)


def trl_behave(completions, **columns):
    """Each completion says what happens to the whole call; None: the reward does not apply."""
    for completion in completions:
        if completion not in ("fine", "not mine"):
            ACTIONS[completion](None)
    return [None if completion == "not mine" else 0.5 for completion in completions]


def trl_messages(completions, prompts, **columns):
    return [float(len(c[0]["content"]) + (p[0]["role"] == "user")) for c, p in zip(completions, prompts, strict=True)]


def trl_needs_difficulty(completions, difficulty):
    return [float(d) for d in difficulty]


def trl_array(completions, **columns):
    return np.ones(len(completions), dtype=np.float32)


def trl_truth(completions, **columns):
    return [True for _ in completions]


def trl_needs_ids(completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


class Batched:
    required_columns = ("answer",)

    def score_batch(self, samples):
        return [RewardOutput(value=float(len(samples))) for _ in samples]


class TooMany:
    def score_batch(self, samples):
        return [RewardOutput(value=1.0)] * (len(samples) + 1)


def always_one(sample):
    return RewardOutput(value=1.0)


def only_small_answers(sample):
    answer = str(sample.columns["answer"])
    return RewardOutput(value=float(sample.completion == answer and len(answer) < 3))


def breaks_on_empty(sample):
    return RewardOutput(value=0.0 if sample.completion[0] else 0.0)


class WrongUnitCases:
    def __call__(self, sample):
        return RewardOutput(value=float(len(sample.completion)))

    def unit_cases(self):
        return [UnitCase(completion="a", expected=1.0), UnitCase(completion="ab", expected=3.0)]


class NoCall:
    pass


def no_arguments():
    return 1.0


ACTIONS = {
    "fine": lambda s: RewardOutput(value=0.5),
    "sleep": lambda s: time.sleep(60),
    "hold the interpreter lock": lambda s: 9**9**9,
    "raise": lambda s: 1 / 0,
    "nan": lambda s: RewardOutput(value=math.nan),
    "inf": lambda s: RewardOutput(value=math.inf),
    "none": lambda s: None,
    "bare float": lambda s: 1.0,
    "bool": lambda s: RewardOutput(value=True),
    "text": lambda s: RewardOutput(value="1.0"),  # type: ignore[arg-type]
    "exit": lambda s: os._exit(3),
    "system exit": lambda s: (_ for _ in ()).throw(SystemExit(1)),
    "print": lambda s: print("noise") or RewardOutput(value=0.25),
}
