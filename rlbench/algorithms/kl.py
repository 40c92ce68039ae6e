"""Per-token estimators of KL(policy || reference) from logprobs of sampled tokens, and what their gradients are.

With d = logprobs - ref_logprobs the gradient of KL(policy || reference) on tokens of the policy is E[d grad logprob].
The plain mean of d has the gradient E[grad logprob] = 0, whatever d is: as a loss it does nothing. Each estimator
below says what it does as a loss. In the reward (algorithm.kl_in=reward) only values matter.

Shapes: T loss positions of one microbatch.
Source: values: Schulman 2020, http://joschu.net/blog/kl-approx.html; gradients: Tang and Munos 2025, arXiv:2506.09477.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Value d, gradient d grad logprob: that of KL(policy || reference), as a score function.

    Args:
        logprobs: float32 [T], with gradient.
        ref_logprobs: float32 [T].
        old_logprobs: float32 [T], not read.

    Returns:
        float32 [T], nats; unbiased for the value, may be negative.

    Source: Schulman 2020; the gradient: arXiv:2506.09477, section 3.
    """
    difference = (logprobs - ref_logprobs).detach()
    return difference + difference * (logprobs - logprobs.detach())


def k2(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased for the value, never negative; gradient d grad logprob, the same as that of `k1`.

    Args and shapes as in `k1`. Source: Schulman 2020; the gradient: arXiv:2506.09477, section 3.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1: unbiased for the value, never negative; gradient (1 - exp(-d)) grad logprob.

    That is the gradient of KL(reference || policy); close to that of `k1` while d is small, bounded where d is large.

    Args and shapes as in `k1`. Source: also arXiv:2402.03300, eq. 4.
    """
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def k3_unbiased(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(policy / old policy) k3: value and gradient unbiased for KL(policy || reference) after several updates too.

    Args and shapes as in `k1`; old_logprobs is read. Source: DeepSeek-V3.2, arXiv:2512.02556, eq. 7.
    """
    return torch.exp(logprobs - old_logprobs) * k3(logprobs, ref_logprobs, old_logprobs)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3_unbiased": k3_unbiased,
}
