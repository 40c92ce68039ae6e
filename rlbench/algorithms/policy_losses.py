"""Policy losses of single tokens, and the table of all policy losses.

Each is a pure function of LossInputs: sum_t weights_t loss_t, the weights being given. Which options a loss reads, and
what it needs to be given, is declared in `rlbench.config.algorithm.LOSSES`.

Shapes: T loss positions of one microbatch or of one chunk of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import (
    LossInputs,
    LossOutput,
    check_same_shape,
    masked_log_ratio,
    masked_logprobs,
    token_frac,
    weighted_sum,
)
from rlbench.algorithms.selection import select_at_random_within, select_highest
from rlbench.algorithms.sequence_losses import gmpo, gspo, gspo_token, sequence_surrogate, vespo


def reinforce(inputs: LossInputs) -> LossOutput:
    """-A logprob: the score-function gradient, without ratio or clip.

    Use it with one update a batch. With several, nothing corrects for the policy having moved since.

    Source: Williams 1992, Machine Learning 8, REINFORCE.
    """
    check_same_shape(inputs)
    return LossOutput(loss=weighted_sum(-inputs.advantages * masked_logprobs(inputs), inputs), metrics={})


def clipped_surrogate(
    inputs: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_max: float | None = None
) -> LossOutput:
    """PPO-clip surrogate: -min(r A, clip(r, 1 - low, 1 + high) A), r = policy / old policy.

    Args:
        inputs: one microbatch; see LossInputs for shapes.
        clip_ratio_low: lower clip distance, in (0, 1).
        clip_ratio_high: upper clip distance, > 0; larger than the lower one gives DAPO's clip-higher.
        clip_ratio_max: r is cut here too; it matters where A < 0, whose loss is otherwise unbounded. Dual clip (c) and
            two-sided clip (delta) are both this. None: no cut.

    Returns:
        The loss and `loss/clip_frac`, the share of loss tokens whose gradient the clip removed.

    Raises:
        ValueError: if a tensor of `inputs` has another shape than `logprobs`.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, section 3.1; dual clip: Ye et al.
    2020, arXiv:1912.09729; delta: INTELLECT-2, arXiv:2505.07291.
    """
    check_same_shape(inputs)
    ratio = masked_log_ratio(inputs).exp()  # [T]
    surrogate = ratio.clamp(max=clip_ratio_max) * inputs.advantages if clip_ratio_max else ratio * inputs.advantages
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * inputs.advantages
    is_clipped = clipped < surrogate
    if clip_ratio_max:
        is_clipped = is_clipped | ((inputs.advantages < 0) & (ratio > clip_ratio_max))
    loss = weighted_sum(-torch.minimum(surrogate, clipped), inputs)
    return LossOutput(loss=loss, metrics={"loss/clip_frac": token_frac(is_clipped, inputs)})


def cispo(inputs: LossInputs, *, clip_ratio_max: float) -> LossOutput:
    """-sg(min(r, max)) A logprob: the ratio is cut, but every token keeps its gradient.

    Use it with several updates a batch, when the clip would silence rare tokens that matter.

    Returns:
        The loss and `loss/clip_frac`, the share of loss tokens whose ratio is cut.

    Source: MiniMax-M1, arXiv:2506.13585; without lower bound and with a cap of 4 to 8 as in ScaleRL, arXiv:2510.13786.
    """
    check_same_shape(inputs)
    ratio = masked_log_ratio(inputs).detach().exp()  # [T]
    loss = weighted_sum(-ratio.clamp(max=clip_ratio_max) * inputs.advantages * masked_logprobs(inputs), inputs)
    return LossOutput(loss=loss, metrics={"loss/clip_frac": token_frac(ratio > clip_ratio_max, inputs)})


def sapo(inputs: LossInputs, *, gate_temperature_pos: float, gate_temperature_neg: float) -> LossOutput:
    """-(4 / tau) sigmoid(tau (r - 1)) A with tau by the sign of A: a soft gate in the place of the clip.

    The gradient is that of REINFORCE at r = 1 and fades as r leaves 1; a larger tau fades faster.

    Args:
        inputs: one microbatch.
        gate_temperature_pos: tau where A > 0.
        gate_temperature_neg: tau elsewhere.

    Returns:
        The loss and `loss/gate_mean`, the mean over loss tokens of the gate's slope, 1 at r = 1.

    Source: Soft Adaptive Policy Optimization, arXiv:2511.20347.
    """
    check_same_shape(inputs)
    ratio = masked_log_ratio(inputs).exp()  # [T]
    temperature = torch.where(inputs.advantages > 0, gate_temperature_pos, gate_temperature_neg)
    gate = torch.sigmoid(temperature * (ratio - 1))
    loss = weighted_sum(-4 / temperature * gate * inputs.advantages, inputs)
    slope = (4 * gate * (1 - gate)).detach()
    return LossOutput(loss=loss, metrics={"loss/gate_mean": (slope * inputs.loss_mask).sum() / inputs.num_loss_tokens})


def clip_cov(
    inputs: LossInputs,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    covariance_frac: float,
    covariance_low: float,
    covariance_high: float,
) -> LossOutput:
    """`clipped_surrogate` with the selected tokens left out: a few of those that cost the most entropy.

    Selected once a batch (`select_at_random_within`): `covariance_frac` of the tokens, at random among those whose
    covariance of logprob and advantage lies in [covariance_low, covariance_high]. The paper's equation has no clip of
    ratios besides; its code has, and so has this.

    Returns:
        The loss and the shares of clipped and of selected loss tokens.

    Source: Cui et al. 2025, arXiv:2505.22617, section 4 (Clip-Cov).
    """
    selected = _selected(inputs)
    check_same_shape(inputs)
    ratio = masked_log_ratio(inputs).exp()  # [T]
    surrogate = ratio * inputs.advantages
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * inputs.advantages
    per_token = torch.where(selected, 0.0, -torch.minimum(surrogate, clipped))
    metrics = {
        "loss/clip_frac": token_frac(clipped < surrogate, inputs),
        "loss/selected_frac": token_frac(selected, inputs),
    }
    return LossOutput(loss=weighted_sum(per_token, inputs), metrics=metrics)


def kl_cov(inputs: LossInputs, *, covariance_frac: float, covariance_kl_coef: float) -> LossOutput:
    """-r A, plus `covariance_kl_coef` |log r| on the selected tokens: a penalty on moving those that cost entropy.

    Selected once a batch (`select_highest`): the `covariance_frac` of tokens with the highest covariance of logprob
    and advantage. The penalty has no gradient at the first update, where r = 1: use several updates a batch.

    Returns:
        The loss and `loss/selected_frac`.

    Source: Cui et al. 2025, arXiv:2505.22617, section 4 (KL-Cov); |log r| as in the authors' code.
    """
    selected = _selected(inputs)
    check_same_shape(inputs)
    log_ratio = masked_log_ratio(inputs)
    penalty = torch.where(selected, covariance_kl_coef * log_ratio.abs(), 0.0)
    loss = weighted_sum(-log_ratio.exp() * inputs.advantages + penalty, inputs)
    return LossOutput(loss=loss, metrics={"loss/selected_frac": token_frac(selected, inputs)})


def _selected(inputs: LossInputs) -> Tensor:
    assert inputs.is_selected is not None, "LossSpec.needs_selection must be declared"
    return inputs.is_selected


POLICY_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "reinforce": reinforce,
    "clipped_surrogate": clipped_surrogate,
    "cispo": cispo,
    "sapo": sapo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "sequence_surrogate": sequence_surrogate,
    "gmpo": gmpo,
    "vespo": vespo,
}
# Which tokens a loss singles out over the whole batch: a function of covariances [T], a generator and its options.
SELECTIONS: dict[str, Callable[..., Tensor]] = {"clip_cov": select_at_random_within, "kl_cov": select_highest}
