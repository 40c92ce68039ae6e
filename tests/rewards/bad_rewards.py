"""Rewards that misbehave, for the pool's tests."""

import math
import os
import time
from pathlib import Path

from rlbench_rewards import RewardOutput


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
