"""Short measured probes of a run's own parts: generation at two lengths, updates at several sizes, the head alone."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlbench.build import BaseParts, Inputs, Parts, training_sampling
from rlbench.data.packing import Microbatch, pack
from rlbench.data.stream import PromptStream
from rlbench.models.base import storage_bytes
from rlbench.models.moments import MomentBytes
from rlbench.planner.linear_fit import fit
from rlbench.planner.step_work import adapter_bytes, all_moments, beside_weights, with_returns, work_on
from rlbench.records import Prompt, TrainingSample
from rlbench.rollouts.seeds import sampling_seed
from rlbench.tracking.device_memory import DeviceMemory, watch
from rlbench.training.optim import set_lr
from rlbench.weight_sync import sync
from rlbench_kernels import linear_token_loss

SHARES = (0.25, 0.5)  # of the largest microbatch: small enough to be safe and quick
SAFE_SHARE = 0.9  # of the limit that a plan may fill
_GENERATED = (8, 24)  # tokens a row of the generation probes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One measurement.

    Example:
        Probe(size=1024, seconds=3.2, peak_bytes=2_100_000_000)
    """

    size: int  # tokens: packed ones of an update, generated ones of a row
    seconds: float  # of an update: what a batch's updates make of it
    peak_bytes: int  # of the whole process on its device


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    base_bytes: int
    adapter_bytes: int  # of all that the optimizer writes: an adapter, or the float32 weights of a run of all weights
    kv_bytes_per_token: int  # that generation takes besides; 0: its cache has a fixed size
    step_tokens: int  # packed tokens of the run's largest step, completions of full length
    microbatch_tokens: int  # of its largest microbatch
    num_microbatches: int
    generation: list[Probe]  # empty: the run generates nothing
    warm_bytes: int  # what lives after generation and one update; what was freed does not count
    update: list[Probe]
    head_bytes: int  # peak of the logits workspace
    num_rows: int  # sequences decoded together
    moments: MomentBytes  # of the optimizers; paged ones are in no peak
    engine_cache_bytes: int = 0  # of fixed size, held while the engine is awake
    scoring_bytes: int = 0  # peak while the engine scores what the identity check compares
    beside_weights: dict[str, int] | None = None  # with all weights trained: bytes of master weights and frozen copy


def run_probes(inputs: Inputs, parts: Parts, memory: DeviceMemory) -> Probes:
    """Measure. The optimizer gets its state; the adapter stays as it was (learning rate 0)."""
    config = inputs.config
    limit = memory.limit()  # before moments, of which paged ones can leave the device
    step = largest_step(inputs)
    full = _pack(inputs, parts, step)
    microbatch_tokens = max(len(mb.token_ids) for mb in full)
    for optimizer in (parts.optimizer, parts.critic_optimizer):
        if optimizer is not None:
            set_lr(optimizer, 0.0)
    sync(parts.policy.weights(), parts.engine, 0)
    rows = min(len(step), config.engine.max_num_seqs or len(step))
    _generate(inputs, parts, memory, step[:rows], _GENERATED[0])  # warm-up
    generation = [_generate(inputs, parts, memory, step[:rows], length) for length in _GENERATED]
    scoring = _score(inputs, parts, memory, step)
    awake = memory.held()
    parts.engine.sleep()
    cache = awake - memory.held()
    sizes = sorted({max(1, round(share * len(step) / len(full))) for share in SHARES})
    _update(inputs, parts, memory, step[: sizes[0]])  # warm-up; makes the optimizer's state
    memory.settle()
    warm = memory.held()
    update = with_origin([_update(inputs, parts, memory, step[:count]) for count in sizes], warm)
    if microbatch_tokens > update[-1].size and is_safe(update, warm, microbatch_tokens, limit):
        largest = max(full, key=lambda mb: len(mb.token_ids))
        update.append(_update(inputs, parts, memory, largest.samples))
    return Probes(
        base_bytes=storage_bytes(parts.base),
        adapter_bytes=adapter_bytes(parts),
        kv_bytes_per_token=0 if cache else kv_bytes_per_token(parts),
        step_tokens=sum(len(mb.token_ids) for mb in full),
        microbatch_tokens=microbatch_tokens,
        num_microbatches=len(full),
        generation=generation,
        warm_bytes=warm,
        update=update,
        head_bytes=head_bytes(parts, memory, sum(len(s.token_ids) for s in step) // len(full)),
        num_rows=rows,
        engine_cache_bytes=cache,
        scoring_bytes=scoring,
        moments=all_moments(parts, config),
        beside_weights=beside_weights(parts),
    )


def with_origin(update: list[Probe], warm: int) -> list[Probe]:
    """With one size alone, a few long samples, the line begins at nothing: above what more tokens will take."""
    if len({probe.size for probe in update}) > 1:
        return update
    return [Probe(size=0, seconds=0.0, peak_bytes=warm), *update]


def is_safe(update: Sequence[Probe], warm: int, num_tokens: int, limit: int) -> bool:
    """Whether the line through the small sizes says that an update of `num_tokens` fits, with room to spare."""
    above = fit([p.size for p in update], [max(0, p.peak_bytes - warm) for p in update])
    return warm + above.at(num_tokens) <= SAFE_SHARE**2 * limit


def largest_step(inputs: Inputs) -> list[TrainingSample]:
    """The run's longest prompts with completions of sampling.max_tokens, whose tokens are random."""
    group_size = inputs.config.algorithm.group_size or 1
    return [_sample(prompt, i, inputs) for prompt in largest_prompts(inputs) for i in range(group_size)]


def largest_prompts(inputs: Inputs) -> list[Prompt]:
    """Of the prompts of all the run's steps those of the longest step: their order follows from the seed.

    A curriculum may draw any: of it the longest of all.
    """
    config = inputs.config
    if config.algorithm.curriculum.is_on:
        longest = sorted(inputs.train.prompts, key=lambda prompt: -len(prompt.token_ids))
        return longest[: config.algorithm.prompts_per_step or 1]
    stream = PromptStream(inputs.train.prompts, seed=config.seed, shuffle=config.data.shuffle)
    size = config.algorithm.prompts_per_step or 1
    steps = [stream.next(size) for _ in range(config.training.num_steps or 1)]
    return max(steps, key=lambda prompts: sum(len(prompt.token_ids) for prompt in prompts))


def _sample(prompt: Prompt, index: int, inputs: Inputs) -> TrainingSample:
    length = inputs.config.sampling.max_tokens
    draw = random.Random(f"{prompt.prompt_id}/{index}")
    sample = TrainingSample(
        group_id=prompt.prompt_id,
        prompt_token_ids=prompt.token_ids,
        token_ids=tuple(draw.choice(prompt.token_ids) for _ in range(length)),
        sampling_logprobs=(-1.0,) * length,
        advantages=((-1.0) ** index,) * length,
        loss_mask=(True,) * length,
    )
    return with_returns(sample, inputs.config)


def _pack(inputs: Inputs, parts: Parts, samples: Sequence[TrainingSample]) -> list[Microbatch]:
    budget = inputs.config.training.tokens_per_microbatch or 1
    return pack(samples, tokens_per_microbatch=budget, device=parts.policy.device)


def _generate(
    inputs: Inputs, parts: Parts, memory: DeviceMemory, samples: Sequence[TrainingSample], length: int
) -> Probe:
    sampling = replace(training_sampling(inputs), max_tokens=length, stop_token_ids=(), stop=())
    seeds = [sampling_seed(0, 0, sample.group_id, index) for index, sample in enumerate(samples)]
    start = time.monotonic()
    with watch(memory) as peak:
        parts.engine.generate([sample.prompt_token_ids for sample in samples], sampling, seeds)
    return Probe(size=length, seconds=time.monotonic() - start, peak_bytes=peak.num_bytes)


def _score(inputs: Inputs, parts: Parts, memory: DeviceMemory, samples: Sequence[TrainingSample]) -> int:
    """Peak of the engine's part of an identity check."""
    left = inputs.config.checks.identity_tokens or 1
    chosen: list[TrainingSample] = []
    for sample in samples:
        left -= len(sample.prompt_token_ids) + len(sample.token_ids)
        if chosen and left < 0:
            break
        chosen.append(sample)
    with watch(memory) as peak:
        parts.engine.score([sample.prompt_token_ids for sample in chosen], [sample.token_ids for sample in chosen])
    return peak.num_bytes


def _update(inputs: Inputs, parts: Parts, memory: DeviceMemory, samples: Sequence[TrainingSample]) -> Probe:
    microbatch = _pack(inputs, parts, samples)[0]
    memory.settle()
    with watch(memory) as peak:
        found = work_on(parts, inputs, microbatch)
    seconds = found.of_batch(inputs.config.algorithm)
    return Probe(size=len(microbatch.token_ids), seconds=seconds, peak_bytes=peak.num_bytes)


def head_bytes(parts: BaseParts, memory: DeviceMemory, num_rows: int) -> int:
    """Peak of logits and their gradient over `num_rows` loss positions, above what is held."""
    weight = parts.policy.head_weight
    hidden = torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    targets = torch.zeros(num_rows, dtype=torch.int64, device=weight.device)
    memory.settle()
    held = memory.held()
    with watch(memory) as peak:
        loss, _, _ = linear_token_loss(hidden, weight, targets, lambda logprobs, *_: (logprobs.sum(), {}), {})
        loss.backward()
    return max(0, peak.num_bytes - held)


def kv_bytes_per_token(parts: Parts) -> int:
    """Keys and values of one token in all layers."""
    config = parts.base.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = parts.policy.head_weight.element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * element
