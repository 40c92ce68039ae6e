"""Pure tensor functions, and the tables of names that a config may choose from."""

from rlbench.algorithms.advantages import group_relative_advantages
from rlbench.algorithms.kl import k3
from rlbench.algorithms.policy_losses import clipped_surrogate

ADVANTAGES = {"group_relative": group_relative_advantages}
POLICY_LOSSES = {"clipped_surrogate": clipped_surrogate}
KL_ESTIMATORS = {"k3": k3}

__all__ = ["ADVANTAGES", "KL_ESTIMATORS", "POLICY_LOSSES"]
