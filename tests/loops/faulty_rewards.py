"""Rewards that fail in every way, by what the completion says."""

import math
import os
import signal
import time

from rlbench_rewards import RewardOutput

WAYS = ("raises", "hangs", "nan", "dies", "value")


def way_of(completion: str) -> str:
    return WAYS[min(sum(map(ord, completion)) % 10, 4)]


def one(sample):
    """1.0, or a failure."""
    way = way_of(sample.completion)
    if way == "raises":
        raise RuntimeError("the verifier fell over")
    if way == "hangs":
        time.sleep(600)
    if way == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return RewardOutput(value=math.nan if way == "nan" else 1.0)


def raises_on_some(sample):
    """1.0, or an error for every third sum: about a third of the rows a+b."""
    if int(sample.columns["answer"]) % 3 == 0:
        raise RuntimeError("the verifier fell over")
    return RewardOutput(value=1.0)


def too_many(completions, **columns):
    """The wrong count."""
    return [1.0] * (len(completions) + 1)


def by_length(sample):
    """A reward that works, with a signal."""
    return RewardOutput(value=float(len(set(sample.completion))))
