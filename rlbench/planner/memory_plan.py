"""From probes to the plan: memory by part, time by phase, the largest batch, the longest completions, the knobs."""

from __future__ import annotations

from dataclasses import dataclass

from rlbench.config.schema import RunConfig
from rlbench.planner.linear_fit import Line, fit
from rlbench.planner.probes import SAFE_SHARE, Probes

GIB = 2**30
UNBOUNDED = 10**9  # tokens: no limit was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """What a setting buys.

    Example:
        Knob(setting="training.tokens_per_microbatch=2048", saves_gib=1.4)
    """

    setting: str
    saves_gib: float  # of the phase that it concerns


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    memory_gib: dict[str, float]  # by part, of the phase that needs most; they add up to peak_gib
    paged_gib: float  # of the optimizer's state, beside the peak: it moves to the host where the device is full
    peak_gib: float
    generation_peak_gib: float
    update_peak_gib: float
    update_gib: Line  # peak of an update by packed tokens of its forward
    limit_gib: float
    time_s: dict[str, float]  # by phase, at most: completions of full length, every sample trained on
    max_microbatch_tokens: int  # packed tokens of one forward that are safe
    max_completion_tokens: int | None  # sampling.max_tokens that is safe; None: nothing is sampled
    knobs: list[Knob]

    @property
    def fits(self) -> bool:
        return self.peak_gib <= SAFE_SHARE * self.limit_gib


def offline_plan(probes: Probes, config: RunConfig, limit_bytes: int) -> MemoryPlan:
    """Extrapolate the probes of a run that generates nothing.

    Args:
        probes, config, limit_bytes: as of `make_plan`.
    """
    above, seconds = _update_lines(probes)
    peak = probes.warm_bytes + above.at(probes.microbatch_tokens)
    update_s = probes.num_microbatches * seconds.at(probes.step_tokens / probes.num_microbatches)
    return MemoryPlan(
        memory_gib=_parts(probes, above, 0.0, peak, 0.0),
        paged_gib=probes.moments.paged / GIB,
        peak_gib=peak / GIB,
        generation_peak_gib=0.0,
        update_peak_gib=peak / GIB,
        update_gib=Line((probes.warm_bytes + above.fixed) / GIB, above.slope / GIB),
        limit_gib=limit_bytes / GIB,
        time_s={"update": update_s},
        max_microbatch_tokens=_largest_microbatch(probes, above, SAFE_SHARE * limit_bytes),
        max_completion_tokens=None,
        knobs=_update_knobs(probes, above, config),
    )


def make_plan(probes: Probes, config: RunConfig, limit_bytes: int, longest_prompt: int, context: int) -> MemoryPlan:
    """Extrapolate the probes to the run's sizes.

    Args:
        probes: measured on this device.
        config: of the run, derived.
        limit_bytes: that the process could use in all.
        longest_prompt: tokens.
        context: tokens that the model takes.
    """
    tokens = config.sampling.max_tokens
    decode = fit([p.size for p in probes.generation], [p.seconds for p in probes.generation])
    # A longer completion costs its keys and values; everything else of a decoding step keeps its size.
    last = probes.generation[-1]
    cache_slope = probes.kv_bytes_per_token * probes.num_rows
    generation_peak = max(last.peak_bytes + cache_slope * max(0, tokens - last.size), probes.scoring_bytes)
    above, seconds = _update_lines(probes)
    update_peak = probes.warm_bytes + above.at(probes.microbatch_tokens)
    room = SAFE_SHARE * limit_bytes
    max_microbatch = _largest_microbatch(probes, above, room)
    waves = -(-(config.algorithm.prompts_per_step or 1) * (config.algorithm.group_size or 1) // probes.num_rows)
    update_s = probes.num_microbatches * seconds.at(probes.step_tokens / probes.num_microbatches)
    return MemoryPlan(
        memory_gib=_parts(probes, above, generation_peak, update_peak, cache_slope * tokens),
        paged_gib=probes.moments.paged / GIB,
        peak_gib=max(generation_peak, update_peak) / GIB,
        generation_peak_gib=generation_peak / GIB,
        update_peak_gib=update_peak / GIB,
        update_gib=Line((probes.warm_bytes + above.fixed) / GIB, above.slope / GIB),
        limit_gib=limit_bytes / GIB,
        time_s={"generation": waves * decode.at(tokens), "update": update_s},
        max_microbatch_tokens=max_microbatch,
        max_completion_tokens=_longest(
            probes, room, generation_peak, tokens, max_microbatch - longest_prompt, context - longest_prompt
        ),
        knobs=_knobs(probes, above, config, cache_slope * tokens),
    )


def _update_lines(probes: Probes) -> tuple[Line, Line]:
    """Bytes above what is held, and seconds, by packed tokens of a microbatch."""
    sizes = [probe.size for probe in probes.update]
    above = fit(sizes, [max(0, probe.peak_bytes - probes.warm_bytes) for probe in probes.update])
    return above, fit(sizes, [probe.seconds for probe in probes.update])


def _largest_microbatch(probes: Probes, above: Line, room: float) -> int:
    return int(min(UNBOUNDED, max(0.0, above.inverse(room - probes.warm_bytes))))


def _parts(probes: Probes, above: Line, generation_peak: float, update_peak: float, cache: float) -> dict[str, float]:
    """Of the phase with the higher peak, in GiB; `runtime` is what nothing else explains: libraries, fragments."""
    adapter = probes.adapter_bytes
    parts: dict[str, float] = {"base weights": probes.base_bytes}
    if probes.beside_weights is not None:
        parts |= probes.beside_weights
    else:
        parts |= {"adapter": adapter} | ({"engine's adapter": adapter / 2} if probes.generation else {})
    parts["optimizer state"] = probes.moments.device
    if update_peak >= generation_peak:
        work = above.at(probes.microbatch_tokens)
        head = min(probes.head_bytes, work)
        parts |= {"gradients": min(adapter, work - head), "logits workspace": head}
        parts["activations"] = max(0.0, work - head - parts["gradients"])
    else:
        parts["KV cache"] = cache + probes.engine_cache_bytes
    peak = max(update_peak, generation_peak)
    parts["runtime"] = peak - sum(parts.values())
    return {name: value / GIB for name, value in parts.items()}


def _longest(
    probes: Probes, room: float, generation_peak: float, tokens: int, of_microbatch: int, of_context: int
) -> int:
    """Completion tokens at which generation, a microbatch of one sample, and the context all still hold."""
    a_token = probes.kv_bytes_per_token * probes.num_rows
    of_cache = tokens + (room - generation_peak) / a_token if a_token else UNBOUNDED
    return max(0, int(min(of_cache, of_microbatch, of_context)))


def _knobs(probes: Probes, above: Line, config: RunConfig, cache: float) -> list[Knob]:
    tokens, trained = _update_knobs(probes, above, config)
    seqs = Knob(setting=f"engine.max_num_seqs={max(1, probes.num_rows // 2)}", saves_gib=cache / 2 / GIB)
    return [tokens, seqs, trained]


def _update_knobs(probes: Probes, above: Line, config: RunConfig) -> list[Knob]:
    half = max(1, probes.microbatch_tokens // 2)
    tokens = Knob(
        setting=f"training.tokens_per_microbatch={half}",
        saves_gib=(above.at(probes.microbatch_tokens) - above.at(half)) / GIB,
    )
    if probes.beside_weights is not None:  # moments, gradients, masters and copy; less the adapter, which is small
        saved = probes.moments.device + probes.adapter_bytes + sum(probes.beside_weights.values())
        return [tokens, Knob(setting="training.parameters=lora", saves_gib=saved / GIB)]
    rank = max(1, config.lora.rank // 2)
    # the numbers, their gradients and the engine's copy in 16 bits; the moments
    saved = (2.5 * probes.adapter_bytes + probes.moments.device) * (1 - rank / config.lora.rank)
    return [tokens, Knob(setting=f"lora.rank={rank}", saves_gib=saved / GIB)]
