"""The loss of a reward model on pairs.

Shapes: P pairs of one microbatch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margins: Tensor, *, centering_coef: float) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centering_coef (chosen + rejected)^2, one value a pair.

    Args:
        chosen: scores, float32 [P], with gradient.
        rejected: the same.
        margins: float32 [P]: by how much the chosen one must win; 0 where the data says nothing.
        centering_coef: at least 0. Without it only differences of scores are determined.

    Returns:
        float32 [P].

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2;
    centering: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margins) + centering_coef * (chosen + rejected) ** 2
