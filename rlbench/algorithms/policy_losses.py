"""Policy losses: per-token surrogates over logprobs, reduced with one global denominator.

Shapes: T packed loss positions of one microbatch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Everything a policy loss may read about one microbatch. All tensors [T]."""

    logprobs: Tensor  # float32, current policy, carries gradient
    old_logprobs: Tensor  # float32, policy before this batch's first update
    advantages: Tensor  # float32
    loss_mask: Tensor  # bool, True on trained tokens
    num_loss_tokens: int  # over ALL microbatches and ranks of the step: the denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    loss: Tensor  # [], sums to the step's loss over microbatches
    metrics: dict[str, Tensor]  # [], each a SUM over loss tokens divided by the denominator


def clipped_surrogate(inputs: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> LossOutput:
    """PPO-clip surrogate: -min(r A, clip(r, 1 - low, 1 + high) A) averaged over loss tokens.

    Args:
        inputs: one microbatch; see LossInputs for shapes.
        clip_ratio_low: lower clip distance, in (0, 1).
        clip_ratio_high: upper clip distance, > 0; larger than the lower one gives DAPO's clip-higher.

    Returns:
        The loss and `loss/clip_frac`, the share of loss tokens whose gradient the clip removed.

    Raises:
        ValueError: if a tensor of `inputs` has another shape than `logprobs`.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, section 3.1.
    """
    _check_same_shape(inputs)
    # Mask before exp: a masked -inf logprob must not reach the backward pass as 0 * inf = nan.
    log_ratio = torch.where(inputs.loss_mask, inputs.logprobs - inputs.old_logprobs, 0.0)  # [T]
    ratio = torch.exp(log_ratio)  # [T]
    surrogate = ratio * inputs.advantages  # [T]
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * inputs.advantages  # [T]
    per_token_loss = -torch.minimum(surrogate, clipped)  # [T]

    loss = (per_token_loss * inputs.loss_mask).sum() / inputs.num_loss_tokens
    clip_frac = ((clipped < surrogate) & inputs.loss_mask).sum() / inputs.num_loss_tokens
    return LossOutput(loss=loss, metrics={"loss/clip_frac": clip_frac})


def _check_same_shape(inputs: LossInputs) -> None:
    expected = inputs.logprobs.shape
    for name in ("old_logprobs", "advantages", "loss_mask"):
        actual = getattr(inputs, name).shape
        if actual != expected:
            raise ValueError(f"{name} has shape {tuple(actual)}, expected {tuple(expected)} to match logprobs")
