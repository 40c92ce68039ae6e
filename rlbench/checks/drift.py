"""How far the trainer's policy is from the one that sampled, on every batch, and what is to be done about it.

Compared are the trainer's logprobs before the batch's first update with the engine's at the same temperature, like with
like: without truncation and penalties on either side (`Completion.engine_logprobs`), or with algorithm.support=sampler
truncated on both (`Completion.sampling_logprobs`).

Shapes: N loss positions of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.config.schema import ChecksConfig
from rlbench.data.packing import Microbatch

OK, WARN, CORRECT, STOP = range(4)
_FIRST_BIN = 16  # positions; each further bin is twice as long


class DriftError(Exception):
    """The trainer's policy is too far from the one that sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Of one batch; `metrics` holds everything, the two numbers are what decisions are made on."""

    gap_mean: float  # |trainer - engine|, nats a token
    ess_frac: float  # effective sample size of the tokens' importance ratios, over their number
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    level: int  # OK, WARN, CORRECT or STOP
    reason: str  # empty for OK


def measure_batch(
    microbatches: Sequence[Microbatch],
    logprobs: Sequence[Tensor],
    *,
    max_ratio: float,
    is_replayed: bool = False,
    is_truncated: bool = False,
) -> Drift | None:
    """`measure_drift` over all microbatches of a step; None if no token of the kind is trained on.

    Args:
        microbatches: of the step.
        logprobs: the trainer's, float32 [N] of each microbatch, before the first update.
        max_ratio: importance ratios are truncated here.
        is_replayed: of completions that earlier policies sampled, whose gap is no drift; else of all others.
        is_truncated: the trainer's logprobs are restricted to the sampler's support.
    """

    if not microbatches:
        return None

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(microbatch, name) for microbatch in microbatches])

    mask = joined("loss_mask") & torch.cat([_is_replayed(microbatch) == is_replayed for microbatch in microbatches])
    if not bool(mask.any()):
        return None
    of_engine = joined("sampling_logprobs" if is_truncated else "engine_logprobs")[mask]
    return measure_drift(torch.cat(list(logprobs))[mask], of_engine, joined("positions")[mask], max_ratio=max_ratio)


def _is_replayed(microbatch: Microbatch) -> Tensor:
    """bool [N]."""
    flags = torch.tensor([sample.is_replayed for sample in microbatch.samples], device=microbatch.loss_mask.device)
    return flags[microbatch.sequence_ids]


def measure_drift(logprobs: Tensor, engine_logprobs: Tensor, positions: Tensor, *, max_ratio: float) -> Drift:
    """Ratios r = exp(trainer - engine), raw and truncated, their effective sample size, and gaps along the completion.

    Effective sample size: (sum r)^2 / sum r^2. `drift/kl` estimates KL(engine || trainer) by the mean of r - 1 - log r.

    Args:
        logprobs: float32 [N], N > 0.
        engine_logprobs: float32 [N].
        positions: int64 [N], place of the token in its completion.
        max_ratio: truncation of the importance ratios.

    Source: effective sample size, Kong 1992; truncated ratios, Ionides 2008; KL estimate, Schulman 2020, "k3".
    """
    log_ratio = (logprobs - engine_logprobs).double()
    gaps, ratio = log_ratio.abs(), log_ratio.exp()
    truncated = ratio.clamp(max=max_ratio)
    ess_frac = float(ratio.sum().square() / ratio.square().sum() / len(ratio))
    metrics = {
        "drift/logprob_gap_mean": float(gaps.mean()),
        "drift/logprob_gap_p99": float(_quantile(gaps, 0.99)),
        "drift/logprob_gap_max": float(gaps.max()),
        "drift/ratio_mean": float(ratio.mean()),
        "drift/ratio_max": float(ratio.max()),
        "drift/truncated_ratio_mean": float(truncated.mean()),
        "drift/truncated_frac": float((ratio > max_ratio).double().mean()),
        "drift/ess_frac": ess_frac,
        "drift/kl": float((ratio - 1 - log_ratio).mean()),
    }
    for start, value in position_curve(gaps, positions):
        metrics[f"drift/logprob_gap_from_{start}"] = value
    return Drift(gap_mean=metrics["drift/logprob_gap_mean"], ess_frac=ess_frac, metrics=metrics)


def position_curve(values: Tensor, positions: Tensor) -> list[tuple[int, float]]:
    """Mean of `values` [N] by position in the completion: (first position, mean) of [0, 16), [16, 32), [32, 64), ...

    Bins without a token are left out.
    """
    curve = []
    start, end = 0, _FIRST_BIN
    longest = int(positions.max())
    while start <= longest:
        is_inside = (positions >= start) & (positions < end)
        if bool(is_inside.any()):
            curve.append((start, float(values[is_inside].mean())))
        start, end = end, 2 * end
    return curve


def decide(drift: Drift, config: ChecksConfig) -> Decision:
    """The ladder: the highest level whose condition holds, and why.

    Args:
        drift: of the batch.
        config: the `checks` part of the config, derived values filled in.
    """
    warn_nats, stop_nats = config.drift_warn_nats, config.drift_stop_nats
    assert warn_nats is not None and stop_nats is not None  # derived when the run starts
    gap = f"trainer and engine differ by {drift.gap_mean:.2g} nats a token on average"
    ess = f"the effective sample size is {drift.ess_frac:.3f} of the tokens"
    if not drift.gap_mean <= stop_nats:  # nan stops
        return Decision(level=STOP, reason=f"{gap}, more than checks.drift_stop_nats of {stop_nats:g}")
    if not drift.ess_frac >= config.drift_stop_ess_frac:
        limit = config.drift_stop_ess_frac
        return Decision(level=STOP, reason=f"{ess}, less than checks.drift_stop_ess_frac of {limit:g}")
    if drift.ess_frac < config.drift_correct_ess_frac:
        limit = config.drift_correct_ess_frac
        return Decision(level=CORRECT, reason=f"{ess}, less than checks.drift_correct_ess_frac of {limit:g}")
    if drift.gap_mean > warn_nats:
        return Decision(level=WARN, reason=f"{gap}, more than checks.drift_warn_nats of {warn_nats:g}")
    return Decision(level=OK, reason="")


def _quantile(values: Tensor, share: float) -> Tensor:
    """Without torch.quantile's limit of 16 million elements."""
    return values.kthvalue(max(1, round(share * len(values)))).values
