"""What a run's hardware profile decides where the user did not, each value with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlbench.config.full_training import FULL, default_lr
from rlbench.config.optim import check_paged
from rlbench.config.replay import check_replay
from rlbench.config.schema import AUTO, STAGES, RunConfig
from rlbench.config.unread import check_engine_settings, check_profile_is_made


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFacts:
    """What was found or measured on this machine before anything is derived."""

    device: str  # "cpu" or "cuda"
    device_name: str
    num_cores: int  # that this process may use
    memory_gib: float  # free for us: host memory on a CPU, device memory on a GPU
    matmul_gflops: dict[str, float]  # by dtype, on `device`
    vllm_problem: str  # why vLLM cannot be used on `device`; empty if it can
    uncapped_gib: float | None = None  # free before hardware.memory_gib; None: there is no cap

    @property
    def memory_words(self) -> str:
        if self.uncapped_gib is None:
            return f"{self.memory_gib:.1f} GiB of free memory"
        return f"hardware.memory_gib={self.memory_gib:g} ({self.uncapped_gib:.1f} GiB are free)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    key: str
    value: object
    reason: str


_FLOAT32_MUST_GAIN = 1.25  # a CPU without bfloat16 units gains 3 and more; a busy moment makes the two look alike

_SIZES = {
    "cpu": {
        "model.path": ("HuggingFaceTB/SmolLM2-135M-Instruct", "a model that two cores can train in minutes"),
        "training.num_steps": (24, "cpu profile: a few minutes on two cores"),
        "training.tokens_per_microbatch": (4096, "cpu profile: about 3 GiB of activations for a 135M model"),
        "evaluation.num_prompts": (64, "cpu profile: about ten seconds for each evaluation"),
    },
    "gpu": {
        "model.path": ("Qwen/Qwen2.5-1.5B-Instruct", "fits every GPU from 16 GiB with room for long completions"),
        "training.num_steps": (200, "gpu profile"),
        "training.tokens_per_microbatch": (8192, "gpu profile: keeps matmuls large, activations in a few GiB"),
        "evaluation.num_prompts": (256, "gpu profile"),
    },
}
_OFFLINE_SIZES = {
    "cpu": {
        "sft.rows_per_step": (16, "cpu profile: a step should take seconds, not minutes"),
        "preference.pairs_per_step": (8, "cpu profile: a step should take seconds, not minutes"),
        "reward_model.pairs_per_step": (8, "cpu profile: a step should take seconds, not minutes"),
    },
    "gpu": {
        "sft.rows_per_step": (64, "gpu profile"),
        "preference.pairs_per_step": (32, "gpu profile"),
        "reward_model.pairs_per_step": (32, "gpu profile"),
    },
}
_RL_SIZES = {
    "cpu": {
        "algorithm.prompts_per_step": (4, "cpu profile: a step should take seconds, not minutes"),
        "algorithm.group_size": (8, "cpu profile: fewest completions that still rank well within a group"),
        "engine.max_num_seqs": (64, "cpu profile: matmul rate no longer rises above 64 rows"),
        "checks.identity_every_steps": (20, "cpu profile: all checks then take 0.5 (hf) to 0.8% (vllm) of a step"),
        "checks.identity_tokens": (256, "cpu profile: one sequence or a few; four forwards of them each time"),
    },
    "gpu": {
        "algorithm.prompts_per_step": (32, "gpu profile"),
        "algorithm.group_size": (8, "gpu profile"),
        "engine.max_num_seqs": (256, "gpu profile"),
        "checks.identity_every_steps": (10, "gpu profile: four forwards of identity_tokens against a step's thousands"),
        "checks.identity_tokens": (4096, "gpu profile: enough for a 99th percentile"),
    },
}


def derive(config: RunConfig, facts: HardwareFacts) -> list[Derivation]:
    """Fill every derived value of `config` in place and return what was filled, with reasons.

    Raises:
        ValueError: if the config asks for hardware or an engine that is not there.
    """
    derived: list[Derivation] = []

    def fill(key: str, value: object, reason: str) -> None:
        section, name = key.split(".")
        if getattr(getattr(config, section), name) in (None, AUTO):
            setattr(getattr(config, section), name, value)
            derived.append(Derivation(key=key, value=value, reason=reason))

    profile = "gpu" if facts.device == "cuda" else "cpu"
    if config.hardware.profile == "gpu" and facts.device != "cuda":
        raise ValueError(
            "hardware.profile is gpu, but torch sees no CUDA device; expected hardware=cpu or hardware=auto"
        )
    cap = "" if facts.uncapped_gib is None else f"; memory: {facts.memory_words}"
    fill("hardware.profile", profile, f"torch sees {facts.device_name}{cap}")
    check_paged(config.optim, config.hardware.profile)
    fill("hardware.num_threads", facts.num_cores, f"{facts.num_cores} cores are open to this process")
    own_sizes = _RL_SIZES if config.stage == "rl" else _OFFLINE_SIZES
    sizes = _SIZES[config.hardware.profile] | own_sizes[config.hardware.profile]
    for key, (value, reason) in sizes.items():
        if config.stage == "rl" or not key.startswith(STAGES[config.stage]):
            fill(key, value, reason)
    check_profile_is_made(config)
    fill("model.dtype", *_dtype(facts))
    fill("optim.lr", *default_lr(config))
    if config.stage == "rl":
        _derive_online(config, facts, fill)
    if config.stage == "preference":
        defaults = config.preference.resolved_defaults(
            has_warm_start=config.lora.init_from is not None, is_full=config.training.parameters == FULL
        )
        for name, (value, reason) in defaults.items():
            fill(f"preference.{name}", value, reason)
    return derived


def _derive_online(config: RunConfig, facts: HardwareFacts, fill: Callable[[str, object, str], None]) -> None:
    """What only a run with an engine needs."""
    for name, (value, reason) in config.algorithm.resolved_defaults().items():
        fill(f"algorithm.{name}", value, reason)
    if config.algorithm.pairs.is_on:
        defaults = config.preference.online_defaults(
            has_warm_start=config.lora.init_from is not None, is_refreshed=config.algorithm.reference_refresh_steps > 0
        )
        for name, (value, reason) in defaults.items():
            fill(f"preference.{name}", value, reason)
    fill("engine.kind", *_engine(config, facts))
    if config.engine.kind == "vllm" and facts.vllm_problem:
        raise ValueError(facts.vllm_problem)
    check_engine_settings(config.engine)
    fill("engine.share", *_share(config))
    if config.engine.kind == "vllm":
        fill("engine.kv_cache_gib", *_kv_cache_gib(config, facts))
    _check_base(config)
    num_parts, num_prompts = config.algorithm.num_minibatches, config.algorithm.prompts_per_step or 1
    if num_parts > num_prompts:
        raise ValueError(
            f"algorithm.num_minibatches is {num_parts}, expected at most algorithm.prompts_per_step ({num_prompts}): "
            "a group is not cut"
        )
    _check_sampling(config)
    _check_success_component(config)
    check_replay(config.algorithm)
    fill("rewards.num_workers", max(1, min(4, facts.num_cores)), "one worker process for each core, at most 4")


def _dtype(facts: HardwareFacts) -> tuple[str, str]:
    rates = facts.matmul_gflops
    measured = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    if rates["float32"] > _FLOAT32_MUST_GAIN * rates["bfloat16"]:
        return "float32", f"measured: {measured}"
    return "bfloat16", f"measured: {measured}; half the memory"


def _engine(config: RunConfig, facts: HardwareFacts) -> tuple[str, str]:
    if config.hardware.profile == "cpu":
        return "hf", "on a CPU with an adapter as fast as vLLM, from one base (scripts/results/generation_cpu.json)"
    if facts.vllm_problem:
        return "hf", f"vLLM cannot be used: {facts.vllm_problem}"
    return "vllm", "the faster one on a GPU"


def _share(config: RunConfig) -> tuple[bool, str]:
    if config.engine.kind == "recorded":
        return True, "engine=recorded computes nothing; the trainer alone has the base"
    if config.engine.kind == "hf":
        return True, "engine=hf computes with the trainer's own tensors"
    if config.hardware.profile == "cpu":
        return False, "vLLM on a CPU repacks the weights, so it needs a copy of its own"
    return True, "the trainer computes with vLLM's own tensors"


def _kv_cache_gib(config: RunConfig, facts: HardwareFacts) -> tuple[float, str]:
    if config.hardware.profile == "cpu":
        return 1.0, "cpu profile"
    return round(0.4 * facts.memory_gib, 1), f"40% of {facts.memory_words}; given back while training"


def _check_base(config: RunConfig) -> None:
    engine, profile = config.engine, config.hardware.profile
    if engine.kind == "hf" and not engine.share:
        raise ValueError("engine.share is false, but engine=hf always shares the base; expected engine.share=true")
    if engine.kind == "vllm" and engine.share and profile == "cpu":
        raise ValueError(
            "engine.share is true, but vLLM on a CPU repacks the weights; expected engine.share=false or engine=hf"
        )
    if config.model.quantization == "nf4" and not (engine.kind == "vllm" and engine.share):
        raise ValueError(
            f"model.quantization is {config.model.quantization}, which needs engine=vllm with engine.share=true on a "
            f"GPU; found engine={engine.kind}, engine.share={str(engine.share).lower()}, hardware={profile}"
        )


def _check_success_component(config: RunConfig) -> None:
    algorithm = config.algorithm
    for name, part in {"curriculum": algorithm.curriculum, "replay": algorithm.replay}.items():
        if part.is_on and part.component not in config.rewards.components:
            raise ValueError(
                f"algorithm.{name}.component is {part.component!r}, but there is no such reward; expected one of "
                f"rewards.components: {', '.join(config.rewards.components) or 'none'}"
            )


def _check_sampling(config: RunConfig) -> None:
    engine, profile = config.engine, config.hardware.profile
    if config.sampling.is_guided and engine.kind != "vllm":
        key = "guided_choice" if config.sampling.guided_choice else "guided_regex"
        raise ValueError(f"sampling.{key} is set, which engine={engine.kind} cannot follow; expected engine=vllm")
    if engine.deterministic and (engine.kind != "vllm" or profile != "gpu"):
        raise ValueError(
            f"engine.deterministic is true, which needs engine=vllm on a GPU (VLLM_BATCH_INVARIANT); found "
            f"engine={engine.kind}, hardware={profile}"
        )
