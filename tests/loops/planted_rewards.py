"""Rewards for the cases that a preflight must tell apart."""

import time

from rlbench_rewards import RewardOutput


def right(sample):
    return RewardOutput(value=1.0)


def wrong(sample):
    return RewardOutput(value=0.0)


def half(sample):
    """Right for every other first character."""
    return RewardOutput(value=float(ord(sample.completion[:1] or " ") % 2))


def broken_for_odd(sample):
    if ord(sample.completion[:1] or " ") % 2:
        raise RuntimeError("the verifier fell over")
    return RewardOutput(value=1.0)


def slow(sample):
    time.sleep(60)
    return RewardOutput(value=1.0)
