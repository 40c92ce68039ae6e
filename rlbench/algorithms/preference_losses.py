"""Losses on preferences: pairs of completions of one prompt, and single completions labelled good or bad.

A loss reads sums of logprobs over completions and returns one value a pair; the step's loss is their mean. Write
c = chosen_logps - ref_chosen_logps, r = rejected_logps - ref_rejected_logps (log ratios), s_c and s_r for what the
f-divergence makes of them (`divergence_scores`; c and r themselves by default), d = s_c - s_r, n_c and n_r for lengths.

Shapes: P pairs of one microbatch, or of the whole step for losses that sort; S single completions of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairInputs:
    """What a loss on pairs may read. All tensors [P], float32 or float64."""

    chosen_logps: Tensor  # sum over the completion's tokens, carries gradient
    rejected_logps: Tensor
    ref_chosen_logps: Tensor  # 0 where the losses need no reference
    ref_rejected_logps: Tensor
    chosen_scores: Tensor  # log ratios after the f-divergence
    rejected_scores: Tensor
    chosen_lengths: Tensor  # tokens
    rejected_lengths: Tensor
    num_pairs: int  # of the step
    num_chosen_tokens: int  # of the step

    @property
    def chosen_ratios(self) -> Tensor:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_ratios(self) -> Tensor:
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margin(self) -> Tensor:
        return self.chosen_scores - self.rejected_scores


def sigmoid(inputs: PairInputs, *, beta: float) -> Tensor:
    """-log sigmoid(beta d). Source: DPO, arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(beta * inputs.margin)


def cdpo(inputs: PairInputs, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e = label_smoothing: labels are wrong with probability e.

    Source: conservative DPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3.
    """
    return _smoothed(beta * inputs.margin, label_smoothing)


def robust(inputs: PairInputs, *, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e): unbiased if a share e of labels is flipped.

    Source: robust DPO, arXiv:2403.00409, eq. 12.
    """
    right, flipped = -F.logsigmoid(beta * inputs.margin), -F.logsigmoid(-beta * inputs.margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(inputs: PairInputs, *, beta: float) -> Tensor:
    """max(0, 1 - beta d). Source: SLiC, arXiv:2305.10425, eq. 1; with log ratios RSO, arXiv:2309.06657, eq. 9."""
    return torch.relu(1 - beta * inputs.margin)


def ipo(inputs: PairInputs, *, beta: float) -> Tensor:
    """(s_c / n_c - s_r / n_r - 1 / (2 beta))^2.

    The paper's actions have no length. With sums over tokens a long pair would have to reach the same margin as a short
    one; means are what its authors advised TRL to take.

    Source: IPO, arXiv:2310.12036, eq. 17, with means over tokens.
    """
    return (_mean_margin(inputs) - 1 / (2 * beta)) ** 2


def sigmoid_norm(inputs: PairInputs, *, beta: float) -> Tensor:
    """-log sigmoid(beta (s_c / n_c - s_r / n_r)): DPO with means over tokens.

    Source: length-normalised DPO, Tulu 3, arXiv:2411.15124, eq. 6.
    """
    return -F.logsigmoid(beta * _mean_margin(inputs))


def exo_pair(inputs: PairInputs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL of (sigmoid(beta d), sigmoid(-beta d)) to (1 - e, e), e = label_smoothing.

    Source: EXO, arXiv:2402.00856, eq. 16.
    """
    z = beta * inputs.margin
    log_chosen, log_rejected = F.logsigmoid(z), F.logsigmoid(-z)
    return log_chosen.exp() * (log_chosen - math.log1p(-label_smoothing)) + log_rejected.exp() * (
        log_rejected - math.log(label_smoothing)
    )


def nca_pair(inputs: PairInputs, *, beta: float) -> Tensor:
    """-log sigmoid(beta c) - (log sigmoid(-beta c) + log sigmoid(-beta r)) / 2.

    Source: noise contrastive alignment, arXiv:2402.05369, eq. 11 for two completions.
    """
    chosen, rejected = beta * inputs.chosen_ratios, beta * inputs.rejected_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(inputs: PairInputs, *, beta: float) -> Tensor:
    """-log sigmoid(beta c) - log sigmoid(-beta r): each completion classified on its own, without a reward shift.

    Source: binary classifier optimization, arXiv:2404.04656, eq. 9 with shift 0.
    """
    return -F.logsigmoid(beta * inputs.chosen_ratios) - F.logsigmoid(-beta * inputs.rejected_ratios)


def sppo_hard(inputs: PairInputs, *, beta: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: the chosen completion wins with probability 1.

    Source: SPPO, arXiv:2405.00675, eq. 4.7.
    """
    return (inputs.chosen_ratios - 0.5 / beta) ** 2 + (inputs.rejected_ratios + 0.5 / beta) ** 2


def aot_pair(inputs: PairInputs, *, beta: float, label_smoothing: float) -> Tensor:
    """Smoothed -log sigmoid(beta (u_i - v_i)), u and v sorted: policy's and reference's chosen - rejected of all pairs.

    TRL calls it `aot`. Source: alignment via optimal transport, arXiv:2406.05882, section 3 (paired data).
    """
    ours = torch.sort(inputs.chosen_logps - inputs.rejected_logps).values
    reference = torch.sort(inputs.ref_chosen_logps - inputs.ref_rejected_logps).values
    return _smoothed(beta * (ours - reference), label_smoothing)


def aot_unpaired(inputs: PairInputs, *, beta: float, label_smoothing: float) -> Tensor:
    """Smoothed -log sigmoid(beta (u_i - v_i)), u and v sorted: the log ratios c and r of all pairs.

    Source: alignment via optimal transport, arXiv:2406.05882, section 3 (unpaired data).
    """
    chosen, rejected = torch.sort(inputs.chosen_ratios).values, torch.sort(inputs.rejected_ratios).values
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(inputs: PairInputs, *, beta: float) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r): for completions better than the model's own.

    Source: anchored preference optimization, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * inputs.chosen_ratios) + torch.sigmoid(beta * inputs.rejected_ratios)


def apo_down(inputs: PairInputs, *, beta: float) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta (c - r)): for completions worse than the model's own.

    Source: anchored preference optimization, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = inputs.chosen_ratios, inputs.rejected_ratios
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop(inputs: PairInputs, *, beta: float, modulation_temperature: float) -> Tensor:
    """(1 - m) (-log sigmoid(z)) + m exp(-z), z = beta d, m = sigmoid(z / modulation_temperature).

    Source: DiscoPOP, arXiv:2406.08414, eq. 5.
    """
    z = beta * inputs.margin
    share = torch.sigmoid(z / modulation_temperature)
    return -F.logsigmoid(z) * (1 - share) + torch.exp(-z) * share


def simpo(inputs: PairInputs, *, beta: float, reward_margin: float) -> Tensor:
    """-log sigmoid(beta (chosen_logps / n_c - rejected_logps / n_r) - reward_margin), without a reference.

    Source: SimPO, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (_mean_chosen(inputs) - _mean_rejected(inputs)) - reward_margin)


def cpo(inputs: PairInputs, *, beta: float, nll_coef: float) -> Tensor:
    """-log sigmoid(beta (chosen_logps - rejected_logps)) + nll_coef NLL of the chosen completions, without a reference.

    The NLL is that of `sft`, a mean over tokens as in the authors' code; the paper writes a sum over the completion.

    Source: contrastive preference optimization, arXiv:2401.08417, eqs. 3 and 5.
    """
    return -F.logsigmoid(beta * (inputs.chosen_logps - inputs.rejected_logps)) + nll_coef * sft(inputs)


def orpo(inputs: PairInputs, *, beta: float) -> Tensor:
    """NLL of the chosen completions - beta log sigmoid(log odds(m_c) - log odds(m_r)), without a reference.

    m = mean logprob of a token, log odds(m) = m - log(1 - exp(m)); beta is the paper's lambda. The NLL is that of
    `sft`: long completions count more in it than in the paper's mean over completions, as in TRL.
    Source: ORPO, arXiv:2403.07691, eqs. 6 and 7.
    """
    chosen, rejected = _mean_chosen(inputs), _mean_rejected(inputs)
    log_odds_ratio = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft(inputs) - beta * F.logsigmoid(log_odds_ratio)


def sft(inputs: PairInputs) -> Tensor:
    """NLL of the chosen completions: a token counts the same in the step's mean over pairs, whatever its completion.

    Source: the third term of mixed preference optimization (MPO), arXiv:2411.10442, section 3.2.
    """
    return -inputs.chosen_logps * (inputs.num_pairs / inputs.num_chosen_tokens)


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot_pair": aot_pair,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "sft": sft,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleInputs:
    """What a loss on single completions may read. All tensors [S]."""

    logps: Tensor  # sum over the completion's tokens, carries gradient
    ref_logps: Tensor
    is_desirable: Tensor  # bool
    kl: Tensor  # [], no gradient: KL to the reference, from completions of other prompts, over the whole step


def kto(inputs: SingleInputs, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """w (1 - sigmoid(beta (x - kl))) if desirable, else w (1 - sigmoid(beta (kl - x))), x = logps - ref_logps.

    Source: KTO, arXiv:2402.01306, eqs. 7 and 8.
    """
    distance = beta * (inputs.logps - inputs.ref_logps - inputs.kl)
    return _by_label(inputs, torch.sigmoid(-distance), torch.sigmoid(distance), desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    inputs: SingleInputs, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """w (1 - sigmoid(beta x)) if desirable, else w sigmoid(beta x). Source: arXiv:2408.06266, eq. 7, by completion."""
    z = beta * (inputs.logps - inputs.ref_logps)
    return _by_label(inputs, torch.sigmoid(-z), torch.sigmoid(z), desirable_weight, undesirable_weight)


UNPAIRED_LOSSES: dict[str, Callable[..., Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def mismatch_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """max(0, mean(logps - ref_logps)) of completions given to prompts that they do not belong to: [].

    Source: KTO, arXiv:2402.01306, section 4.1.
    """
    return (logps - ref_logps).mean().clamp(min=0).detach()


def divergence_scores(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) for t = exp(log_ratio), the reward that a divergence D_f to the reference implies, up to a constant.

    reverse_kl: log t; forward_kl: 1 - 1/t; js: log(2t / (1 + t)); alpha: (t^(a - 1) - 1) / (a - 1), log t at a = 1. The
    a is TRL's, 1 - alpha of the paper: 1 is reverse_kl, 0 forward_kl.

    Args:
        log_ratio: [P].
        divergence: a key of DIVERGENCES.
        alpha: a; read by "alpha" alone.

    Source: f-DPO, arXiv:2309.16240, table 1.
    """
    return DIVERGENCES[divergence](log_ratio, alpha)


def _alpha_score(log_ratio: Tensor, alpha: float) -> Tensor:
    order = alpha - 1
    if abs(order) < 1e-6:
        return log_ratio
    return torch.expm1((order * log_ratio).clamp(max=_MAX_EXPONENT)) / order


_MAX_EXPONENT = 80.0  # exp of it is finite in float32
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda log_ratio, alpha: log_ratio,
    "forward_kl": lambda log_ratio, alpha: -torch.expm1(-log_ratio),
    "js": lambda log_ratio, alpha: math.log(2) + F.logsigmoid(log_ratio),
    "alpha": _alpha_score,
}


def wpo_log_weights(logprobs: Tensor, sharp_logprobs: Tensor) -> Tensor:
    """log w_t = log p(y_t) - log sum_v p(v)^2: how likely the policy is to write a token, against its own mean.

    With the logprobs at half the temperature, log p^2 - log sum_v p(v)^2, that is sharp_logprobs - logprobs.

    Args:
        logprobs: float32 [N], at the loss's temperature.
        sharp_logprobs: float32 [N], at half of it.

    Returns:
        float32 [N]; a completion's weight is exp of its mean.

    Source: WPO, arXiv:2406.11827, eqs. 2 and 4 (aligned to the mean probability).
    """
    return sharp_logprobs - logprobs


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _mean_margin(inputs: PairInputs) -> Tensor:
    return inputs.chosen_scores / inputs.chosen_lengths - inputs.rejected_scores / inputs.rejected_lengths


def _mean_chosen(inputs: PairInputs) -> Tensor:
    return inputs.chosen_logps / inputs.chosen_lengths


def _mean_rejected(inputs: PairInputs) -> Tensor:
    return inputs.rejected_logps / inputs.rejected_lengths


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation; a certain completion counts as almost certain.

    Source: Maechler 2012, https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_small = x > -math.log(2)
    near, far = torch.where(is_small, x, -1.0), torch.where(is_small, -1.0, x)  # no nan gradient from either side
    return torch.where(is_small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _by_label(inputs: SingleInputs, desirable: Tensor, undesirable: Tensor, weight: float, other: float) -> Tensor:
    return torch.where(inputs.is_desirable, weight * desirable, other * undesirable)
