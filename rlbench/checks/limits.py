"""How far engine and trainer may disagree on the logprob of one token: honest pairs, measured, times a margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rlbench.config.derive import Derivation
from rlbench.config.schema import RunConfig

MARGIN = 3.0  # a proof looks at a few hundred tokens, the measurements at thousands; other models differ more
WARN_MARGIN, STOP_MARGIN = 2.5, 8.0  # of the mean gap, for the drift of a whole batch


@dataclass(frozen=True, slots=True)
class Gap:
    """|engine - trainer| over tokens, in nats."""

    mean: float
    p99: float
    max: float

    def exceeds(self, limit: Gap) -> bool:
        return not (self.mean <= limit.mean and self.p99 <= limit.p99 and self.max <= limit.max)  # nan exceeds

    def __str__(self) -> str:
        return f"{self.mean:.2g} / {self.p99:.2g} / {self.max:.2g}"


# Below these no gap counts, however small the measured one: they are far under the effect of a wrong adapter.
FLOORS = {"float32": Gap(1e-4, 1e-3, 5e-3), "bfloat16": Gap(1e-2, 5e-2, 2e-1)}


class Pair(NamedTuple):
    """An engine and the trainer that it samples for."""

    engine: str
    device: str  # cpu | cuda
    dtype: str
    quantization: str
    kv_cache_dtype: str = "auto"

    @property
    def roundings(self) -> tuple[str, ...]:
        """What vLLM rounds to FP8 and no trainer does; of an FP8 base the inputs (`rlbench.models.fp8_linear`)."""
        if self.engine != "vllm":
            return ()
        base = ("an FP8 base",) if self.quantization == "fp8" else ()
        return (*base, "FP8 keys and values") if self.kv_cache_dtype == "fp8" else base


# An honest pair on sampled tokens of SmolLM2-135M-Instruct at temperature 1.
# cpu: the largest of as sampled, scored with an adapter, scored without it, 16 completions
# (scripts/measure_identity.py, scripts/results/identity_cpu.json); with fp8 as sampled, 24 completions
# (scripts/measure_fp8.py, scripts/results/fp8_cpu.json; of keys and values, which a CPU cuts off where a GPU takes the
# nearest number, scripts/measure_fp8_kv.py, scripts/results/fp8_kv_cpu.json).
# cuda: one H100, vLLM 0.26 against a transformers model bound to its tensors, no adapter; nf4 on 8,000 tokens with the
# float32 logits of today, 0.042 mean with bf16 ones (scripts/results/shared_base_h100.json); none on 15,000 tokens with
# bf16 logits, so a little wide; fp8 on one H200, 8,192 tokens (scripts/results/fp8_h200.json). Where it comes from:
# scripts/measure_rounding.py.
MEASURED: Mapping[Pair, Gap] = {
    Pair("hf", "cpu", "float32", "none"): Gap(8.5e-6, 2.3e-5, 3.1e-5),
    Pair("hf", "cpu", "bfloat16", "none"): Gap(0.039, 0.22, 0.47),
    Pair("vllm", "cpu", "bfloat16", "none"): Gap(0.043, 0.24, 0.5),
    Pair("vllm", "cuda", "bfloat16", "none"): Gap(0.039, 0.21, 1.08),
    Pair("vllm", "cuda", "bfloat16", "nf4"): Gap(0.032, 0.175, 0.37),
    Pair("vllm", "cuda", "bfloat16", "fp8"): Gap(0.112, 0.63, 2.05),
    Pair("vllm", "cuda", "bfloat16", "none", "fp8"): Gap(0.122, 0.7, 2.14),
    Pair("vllm", "cpu", "bfloat16", "fp8"): Gap(0.112, 0.53, 2.12),
    Pair("vllm", "cpu", "bfloat16", "none", "fp8"): Gap(0.162, 1.03, 2.27),
    Pair("vllm", "cpu", "bfloat16", "fp8", "fp8"): Gap(0.205, 1.21, 1.99),
}


def honest_gap(pair: Pair) -> tuple[Gap, str]:
    """The measured gap of this pair, else the largest of its dtype; and where it comes from, in words.

    Where vLLM rounds to FP8, only pairs that round the same are compared, in any dtype if none has this one.
    """
    rounded = f" with {' and '.join(pair.roundings)}" if pair.roundings else ""
    where = f"engine={pair.engine} on {pair.device}"
    if pair in MEASURED:
        return MEASURED[pair], f"measured for {where} in {pair.dtype}, quantization {pair.quantization}{rounded}"
    alike = {other: gap for other, gap in MEASURED.items() if other.roundings == pair.roundings}
    of_dtype = {other: gap for other, gap in alike.items() if other.dtype == pair.dtype}
    if not of_dtype and not pair.roundings:
        return Gap(0, 0, 0), f"no pair has been measured in {pair.dtype}, the floor counts"
    others = of_dtype or alike
    widest = Gap(*(max(getattr(gap, name) for gap in others.values()) for name in ("mean", "p99", "max")))
    kind = ", ".join(sorted({other.dtype for other in others}))
    unknown = "has no measurement of its own"
    if pair.kv_cache_dtype == "fp8" and pair.device == "cuda":
        unknown += ", and a GPU rounds otherwise: to the nearest number, but maybe queries and probabilities too"
    return widest, f"the widest measured in {kind}{rounded}; {where} {unknown}"


def identity_limit(config: RunConfig) -> Gap:
    """What the proof of `rlbench.checks.policy_identity` tolerates for this run; every choice is derived already."""
    gap, _ = honest_gap(_pair(config))
    floor, scale = FLOORS[config.model.dtype], config.checks.identity_limit_scale
    return Gap(
        *(scale * max(MARGIN * getattr(gap, name), getattr(floor, name)) for name in ("mean", "p99", "max"))
    )  # fmt: skip


def derive_drift_limits(config: RunConfig) -> list[Derivation]:
    """Fill `checks.drift_warn_nats` and `checks.drift_stop_nats` where they are open; what was filled, with reasons."""
    gap, source = honest_gap(_pair(config))
    floor = FLOORS[config.model.dtype].mean
    derived = []
    for name, margin in (("drift_warn_nats", WARN_MARGIN), ("drift_stop_nats", STOP_MARGIN)):
        if getattr(config.checks, name) is None:
            value = float(f"{margin * max(gap.mean, floor):.2g}")
            setattr(config.checks, name, value)
            reason = f"{margin:g} times the mean gap of an honest pair, {max(gap.mean, floor):.2g}: {source}"
            derived.append(Derivation(key=f"checks.{name}", value=value, reason=reason))
    return derived


def _pair(config: RunConfig) -> Pair:
    device = "cuda" if config.hardware.profile == "gpu" else "cpu"
    engine, model = config.engine, config.model
    return Pair(engine.kind, device, model.dtype, model.quantization, engine.kv_cache_dtype)
