"""Pure functions of the algorithms, and the tables of names that a config may choose from."""

from rlbench.algorithms.advantages import GROUP_ADVANTAGES
from rlbench.algorithms.distillation import teacher
from rlbench.algorithms.gae import gae
from rlbench.algorithms.kl import KL_ESTIMATORS
from rlbench.algorithms.policy_losses import POLICY_LOSSES, SELECTIONS
from rlbench.algorithms.reduce import NORMALIZATIONS

ADVANTAGES = {**GROUP_ADVANTAGES, "gae": gae, "teacher": teacher}

__all__ = ["ADVANTAGES", "KL_ESTIMATORS", "NORMALIZATIONS", "POLICY_LOSSES", "SELECTIONS"]
