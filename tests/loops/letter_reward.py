"""A reward with a known optimum: the share of the letter `a`."""

import time

from rlbench_rewards import RewardOutput


def share_of_a(sample):
    return RewardOutput(value=sample.completion.count("a") / max(1, len(sample.completion)))


def accuracy(sample):
    return RewardOutput(value=float(sample.completion.count("a") > 4))


def rarely(sample):
    """1 for a completion with two letters `a`: most groups of the untrained model have none."""
    return RewardOutput(value=float(sample.completion.count("a") > 1))


def at_all(sample):
    """1 for a completion with a letter `a`: about every eighth of the untrained model."""
    return RewardOutput(value=float("a" in sample.completion))


def share_of_lowercase(sample):
    return RewardOutput(value=sum(c.islower() for c in sample.completion) / max(1, len(sample.completion)))


def takes_a_minute(sample):
    """For tests that must meet a run in the middle of a step."""
    time.sleep(60)
    return RewardOutput(value=0.0)


def takes_a_moment(sample):
    time.sleep(0.5)
    return RewardOutput(value=0.0)


def takes_its_time(sample):
    """Up to 40 ms, by the completion: the scores come in another order than the completions."""
    time.sleep(0.02 * (sum(map(ord, sample.completion)) % 3))
    return RewardOutput(value=float(sample.completion.count("b")))
