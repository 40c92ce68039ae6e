"""Per-token estimators of KL(policy || reference) from logprobs of sampled tokens.

Shapes: T packed loss positions of one microbatch.
"""

import torch
from torch import Tensor


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref_logprobs - logprobs: unbiased for the value of the KL, never negative.

    Args:
        logprobs: float32 [T], with gradient.
        ref_logprobs: float32 [T].

    Returns:
        float32 [T], nats.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html; arXiv:2402.03300, eq. 4.
    """
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference
