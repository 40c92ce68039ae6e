"""Policy losses that sum over whole sequences. Every sequence must lie in one microbatch.

A loss of a sequence is written at each of its tokens; `weights` with normalization=sequence_mean then gives the mean
over sequences. Shapes: T loss positions of one microbatch, B its sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import (
    LossInputs,
    LossOutput,
    check_same_shape,
    masked_log_ratio,
    masked_logprobs,
    mean_by_sequence,
    sum_by_sequence,
    token_frac,
    weighted_sum,
)


def gspo(inputs: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> LossOutput:
    """-min(s A, clip(s, 1 - low, 1 + high) A) with s = exp(mean_t log(policy / old policy)), one ratio a sequence.

    With normalization=sequence_mean this is GSPO, with sequence_sum LUSPO. Use it when ratios of single tokens are too
    noisy (mixtures of experts); the clip distances are far smaller than those of token ratios.

    Args:
        inputs: one microbatch; see LossInputs.
        clip_ratio_low: lower clip distance, in (0, 1).
        clip_ratio_high: upper clip distance, > 0.

    Returns:
        The loss and `loss/clip_frac`, the share of loss tokens whose sequence is clipped.

    Source: Zheng et al. 2025, arXiv:2507.18071, section 4.1; LUSPO, arXiv:2602.05261.
    """
    check_same_shape(inputs)
    ratio = mean_by_sequence(masked_log_ratio(inputs), inputs).exp()  # [T], equal within a sequence
    return _clipped(ratio, inputs, clip_ratio_low, clip_ratio_high)


def gspo_token(inputs: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> LossOutput:
    """As `gspo`, with s_t = sg(s) policy_t / sg(policy_t): the ratio of the sequence, the gradient of the token.

    Equal to `gspo` in value and gradient while advantages are equal within each sequence. Use it when they are not.

    Source: Zheng et al. 2025, arXiv:2507.18071, section 4.3.
    """
    check_same_shape(inputs)
    log_ratio = masked_log_ratio(inputs)
    sequence_log_ratio = mean_by_sequence(log_ratio.detach(), inputs)
    ratio = (sequence_log_ratio + log_ratio - log_ratio.detach()).exp()  # [T]
    return _clipped(ratio, inputs, clip_ratio_low, clip_ratio_high)


def sequence_surrogate(inputs: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> LossOutput:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = policy(completion) / old policy(completion): the whole product.

    The completion is one action, as in RLOO; with normalization=sequence_mean the on-policy gradient is REINFORCE on
    the summed logprobs. The product of many ratios leaves the clip range quickly: meant for few updates a batch.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3 (the completion as one action), with PPO's clip.
    """
    check_same_shape(inputs)
    sums = sum_by_sequence(masked_log_ratio(inputs), inputs.sequence_ids, inputs.num_sequences)
    return _clipped(sums.exp()[inputs.sequence_ids], inputs, clip_ratio_low, clip_ratio_high)


def gmpo(inputs: LossInputs, *, clip_log_ratio_low: float, clip_log_ratio_high: float) -> LossOutput:
    """-A exp(mean_t c_t), c_t the log ratio clipped to [-low, high] on the side that the advantage's sign would leave.

    A geometric mean of token ratios: outliers weigh little, so the clip range may be wide. Use with
    normalization=sequence_mean. Where A < 0 the lower bound acts, as in the authors' code; the paper's equation can be
    read with the upper one there, which is the same while low = high.

    Args:
        inputs: one microbatch.
        clip_log_ratio_low: > 0; ratios below exp(-low) are clipped where the advantage is not positive.
        clip_log_ratio_high: > 0; ratios above exp(high) are clipped where it is positive.

    Returns:
        The loss and `loss/clip_frac`, the share of loss tokens that are clipped.

    Source: Zhao et al. 2025, arXiv:2507.20673, with the clip range (e^-0.4, e^0.4) recommended there.
    """
    check_same_shape(inputs)
    log_ratio = masked_log_ratio(inputs)
    is_good = inputs.advantages > 0
    clipped = torch.where(is_good, log_ratio.clamp(max=clip_log_ratio_high), log_ratio.clamp(min=-clip_log_ratio_low))
    ratio = mean_by_sequence(clipped, inputs).exp()  # [T], equal within a sequence
    loss = weighted_sum(-ratio * inputs.advantages, inputs)
    return LossOutput(loss=loss, metrics={"loss/clip_frac": token_frac(clipped != log_ratio, inputs)})


def vespo(
    inputs: LossInputs, *, gamma_k_pos: float, gamma_lambda_pos: float, gamma_k_neg: float, gamma_lambda_neg: float
) -> LossOutput:
    """-sg(phi(w)) A logprob with phi(w) = w^k exp(lambda (1 - w)) and w = policy / sampler over the whole sequence.

    A soft weight instead of a clip: phi(1) = 1, and it falls on both sides. Meant for stale or mismatched samplers.
    The weight is against the engine's own logprobs, so algorithm.importance must be off.

    Args:
        inputs: one microbatch.
        gamma_k_pos, gamma_lambda_pos: k and lambda where the advantage is not negative.
        gamma_k_neg, gamma_lambda_neg: k and lambda where it is.

    Returns:
        The loss and `loss/sequence_weight_mean`, the mean of phi over loss tokens.

    Source: Shen et al. 2026, arXiv:2602.10693; phi and its defaults as in TRL 1.16 (`get_gamma_weights`).
    """
    check_same_shape(inputs)
    with torch.no_grad():
        log_ratio = torch.where(inputs.loss_mask, inputs.logprobs - inputs.sampling_logprobs, 0.0).clamp(-20, 20)
        log_w = sum_by_sequence(log_ratio, inputs.sequence_ids, inputs.num_sequences)[inputs.sequence_ids]
        log_w = log_w.clamp(math.log(1e-8), 20.0)  # [T]
        is_good = inputs.advantages >= 0
        k = torch.where(is_good, gamma_k_pos, gamma_k_neg)
        decay = torch.where(is_good, gamma_lambda_pos, gamma_lambda_neg)
        phi = (decay + k * log_w - decay * log_w.exp()).exp()
    loss = weighted_sum(-phi * inputs.advantages * masked_logprobs(inputs), inputs)
    weight = (phi * inputs.loss_mask).sum() / inputs.num_loss_tokens
    return LossOutput(loss=loss, metrics={"loss/sequence_weight_mean": weight})


def _clipped(ratio: Tensor, inputs: LossInputs, low: float, high: float) -> LossOutput:
    surrogate = ratio * inputs.advantages  # [T]
    clipped = ratio.clamp(1 - low, 1 + high) * inputs.advantages
    loss = weighted_sum(-torch.minimum(surrogate, clipped), inputs)
    return LossOutput(loss=loss, metrics={"loss/clip_frac": token_frac(clipped < surrogate, inputs)})
