"""Rewards: verifiers as plug-ins, run in killable worker processes. Imports nothing heavy."""

from rlbench_rewards.contract import RewardError, RewardOutcome, RewardOutput, RewardSample
from rlbench_rewards.pool import RewardPool

__all__ = ["RewardError", "RewardOutcome", "RewardOutput", "RewardPool", "RewardSample"]
