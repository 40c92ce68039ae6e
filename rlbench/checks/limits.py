"""How far engine and trainer may disagree on the logprob of one token: honest pairs, measured, times a margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

# (engine, device, dtype, quantization) -> an honest pair on sampled tokens of SmolLM2-135M-Instruct at temperature 1.
# cpu: the largest of as sampled, scored with an adapter, scored without it, 16 completions
# (scripts/measure_identity.py, scripts/results/identity_cpu.json); fp8 as sampled, 24 completions
# (scripts/measure_fp8.py, scripts/results/fp8_cpu.json). cuda: one H100, vLLM 0.26 against a transformers
# model bound to its tensors, no adapter; nf4 on 8,000 tokens with the float32 logits of today, 0.042 mean with bf16
# ones (scripts/results/shared_base_h100.json); none on 15,000 tokens with bf16 logits, so a little wide. Where it comes
# from: scripts/measure_rounding.py.
MEASURED: Mapping[tuple[str, str, str, str], Gap] = {
    ("hf", "cpu", "float32", "none"): Gap(8.5e-6, 2.3e-5, 3.1e-5),
    ("hf", "cpu", "bfloat16", "none"): Gap(0.039, 0.22, 0.47),
    ("vllm", "cpu", "bfloat16", "none"): Gap(0.043, 0.24, 0.5),
    ("vllm", "cuda", "bfloat16", "none"): Gap(0.039, 0.21, 1.08),
    ("vllm", "cuda", "bfloat16", "nf4"): Gap(0.032, 0.175, 0.37),
    ("vllm", "cpu", "bfloat16", "fp8"): Gap(0.112, 0.53, 2.12),
}


def honest_gap(engine: str, device: str, dtype: str, quantization: str) -> tuple[Gap, str]:
    """The measured gap of this pair, else the largest of its dtype; and where it comes from, in words."""
    key = (engine, device, dtype, quantization)
    if key in MEASURED:
        return MEASURED[key], f"measured for engine={engine} on {device} in {dtype}, quantization {quantization}"
    others = [gap for pair, gap in MEASURED.items() if pair[2] == dtype and _rounds_inputs(pair) == _rounds_inputs(key)]
    if not others:
        return Gap(0, 0, 0), f"no pair has been measured in {dtype}, the floor counts"
    widest = Gap(max(g.mean for g in others), max(g.p99 for g in others), max(g.max for g in others))
    kind = f"{dtype} on an FP8 base" if _rounds_inputs(key) else dtype
    return widest, f"the widest measured in {kind}; engine={engine} on {device} has no measurement of its own"


def _rounds_inputs(pair: tuple[str, str, str, str]) -> bool:
    """vLLM rounds the inputs of FP8 layers to FP8, which no trainer does (`rlbench.models.fp8_linear`)."""
    return pair[0] == "vllm" and pair[3] == "fp8"


def identity_limit(config: RunConfig) -> Gap:
    """What the proof of `rlbench.checks.policy_identity` tolerates for this run; every choice is derived already."""
    gap, _ = honest_gap(*_pair(config))
    floor, scale = FLOORS[config.model.dtype], config.checks.identity_limit_scale
    return Gap(
        *(scale * max(MARGIN * getattr(gap, name), getattr(floor, name)) for name in ("mean", "p99", "max"))
    )  # fmt: skip


def derive_drift_limits(config: RunConfig) -> list[Derivation]:
    """Fill `checks.drift_warn_nats` and `checks.drift_stop_nats` where they are open; what was filled, with reasons."""
    gap, source = honest_gap(*_pair(config))
    floor = FLOORS[config.model.dtype].mean
    derived = []
    for name, margin in (("drift_warn_nats", WARN_MARGIN), ("drift_stop_nats", STOP_MARGIN)):
        if getattr(config.checks, name) is None:
            value = float(f"{margin * max(gap.mean, floor):.2g}")
            setattr(config.checks, name, value)
            reason = f"{margin:g} times the mean gap of an honest pair, {max(gap.mean, floor):.2g}: {source}"
            derived.append(Derivation(key=f"checks.{name}", value=value, reason=reason))
    return derived


def _pair(config: RunConfig) -> tuple[str, str, str, str]:
    device = "cuda" if config.hardware.profile == "gpu" else "cpu"
    return config.engine.kind, device, config.model.dtype, config.model.quantization
