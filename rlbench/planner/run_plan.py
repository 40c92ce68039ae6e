"""The plan that a run leaves in its folder: a `plan` command's for the same settings; online runs else a formula's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlbench.build import BaseInputs, BaseParts, Inputs, Parts
from rlbench.config.schema import STAGES, RunConfig
from rlbench.data.packing import pack
from rlbench.data.prompts import longest_prompt_tokens
from rlbench.models.base import storage_bytes
from rlbench.models.layer_shape import LayerShape
from rlbench.models.memory import backward_bytes, kept_bytes
from rlbench.models.policy import Policy
from rlbench.planner.memory_plan import MemoryPlan, make_plan
from rlbench.planner.probes import Probe, Probes, kv_bytes_per_token, largest_prompts
from rlbench.planner.step_work import adapter_bytes, all_moments, beside_weights
from rlbench.records import TrainingSample
from rlbench.tracking.device_memory import DeviceMemory, device_memory

FILE_NAME = "plan.json"
FORMULA = "formula: what is held after loading, and what the layers keep for each token; times are not planned"
_NOT_PLANNED = ("name", "seed", "resume", "rewards", "checks", "evaluation", "checkpoint", "tracking", "chain")
_COUNTED_TOKENS = (16, 48)  # of the forwards whose saved tensors are counted: tenths of a second with 135M on two cores
_SCORED_ROWS = 1024  # vLLM scores a batch in parts of so many tokens, and keeps a part's logits until the next are made
_HEAD_BYTES = 160 * 2**20  # rlbench_kernels.linear_logprobs: two float32 buffers of 64 MiB and one of 16 bits


def write_run_plan(inputs: BaseInputs, parts: BaseParts, run_folder: Path) -> str:
    """Leave plan.json in the run's folder; a run must not fail for want of it.

    Returns:
        "" or why there is none.
    """
    try:
        record = find_measured_plan(inputs.config, run_folder)
        if record is None:
            if not (isinstance(inputs, Inputs) and isinstance(parts, Parts)):
                return ""
            memory = device_memory(inputs.config.hardware, parts.engine.released_bytes)
            record = plan_record(formula_plan(inputs, parts, memory), inputs.config, memory, FORMULA)
        (run_folder / FILE_NAME).write_text(json.dumps(record, indent=1))
    except (ValueError, AttributeError, OSError) as error:  # no /proc, or layers that LayerShape does not describe
        return f"there is no {FILE_NAME}: {error}"
    return ""


def plan_record(made: MemoryPlan, config: RunConfig, memory: DeviceMemory, source: str) -> dict[str, Any]:
    """What plan.json holds, whoever made the plan."""
    return {
        "kind": memory.name,
        "source": source,
        "fits": made.fits,
        "plan": asdict(made),
        "config": planned_settings(asdict(config)),
    }


def planned_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on which memory and time of a run of its stage depend."""
    return {key: value for key, value in config.items() if key not in (*_NOT_PLANNED, *STAGES[config["stage"]])}


def find_measured_plan(config: RunConfig, run_folder: Path) -> dict[str, Any] | None:
    """The newest record of a `plan` command for the same settings, beside the run or beside its sweep."""
    wanted = planned_settings(asdict(config))
    places = [place for parent in list(run_folder.parents)[:2] for place in parent.glob(f"plan_*/{FILE_NAME}")]
    for place in sorted(places, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            record = json.loads(place.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("config") == wanted:
            return record | {"source": f"measured by `plan`: {place}"}
    return None


def formula_plan(inputs: Inputs, parts: Parts, memory: DeviceMemory) -> MemoryPlan:
    """Memory without a probe that takes time: held bytes, state of the optimizer, and activations by the token."""
    config = inputs.config
    kept, dense = _activation_bytes(inputs, parts)
    memory.settle()
    held = memory.held()  # on a CPU with the code and caches that a first forward and backward bring in
    parts.engine.sleep()  # it wakes by itself
    asleep = memory.held()
    adapter = adapter_bytes(parts)
    moments = all_moments(parts, config)
    prompts = largest_prompts(inputs)
    group, tokens = config.algorithm.group_size or 1, config.sampling.max_tokens
    step_tokens = sum(len(p.token_ids) + group * (tokens - 1) for p in prompts)
    budget = config.training.tokens_per_microbatch or 1
    rows = min(len(prompts) * group, config.engine.max_num_seqs or len(prompts) * group)
    per_token = 0 if config.engine.kind == "vllm" else kv_bytes_per_token(parts)  # vLLM's cache is held already
    prefill = held + per_token * longest_prompt_tokens(prompts) * len(prompts)
    head = _head_bytes(inputs, parts, min(budget, step_tokens))
    warm = asleep + moments.device
    probes = Probes(
        base_bytes=storage_bytes(parts.base),
        adapter_bytes=adapter,
        kv_bytes_per_token=per_token,
        step_tokens=step_tokens,
        microbatch_tokens=min(budget, step_tokens),
        num_microbatches=-(-step_tokens // budget),
        generation=[Probe(size=size, seconds=0.0, peak_bytes=prefill) for size in (0, 1)],
        scoring_bytes=held + scored_logits_bytes(config, parts.policy.head_weight.shape[0]),
        warm_bytes=warm,
        update=[
            Probe(size=n, seconds=0.0, peak_bytes=warm + adapter + dense + head + int(kept * n)) for n in (1, budget)
        ],
        head_bytes=head,
        num_rows=rows,
        engine_cache_bytes=held - asleep,
        moments=moments,
        beside_weights=beside_weights(parts),
    )
    made = make_plan(probes, config, memory.limit(), longest_prompt_tokens(inputs.train.prompts), inputs.context_tokens)
    return replace(made, time_s={})


def scored_logits_bytes(config: RunConfig, vocabulary: int) -> int:
    """The engine's float32 logits while it scores what the identity check compares; of vLLM on a GPU."""
    if (config.engine.kind, config.hardware.profile) != ("vllm", "gpu"):
        return 0
    return min(2 * _SCORED_ROWS, config.checks.identity_tokens or 1) * vocabulary * 4


def _activation_bytes(inputs: Inputs, parts: Parts) -> tuple[float, int]:
    """Bytes a packed token at the highest point of an update, and bytes of matrices made dense then; without the head.

    With kernels by `rlbench.models.memory`, else what autograd really keeps of a short forward.
    """
    config, text_config = inputs.config, parts.base.config.get_text_config()
    item = parts.policy.head_weight.element_size()
    shape = LayerShape.from_config(text_config)
    if parts.policy.has_kernel_layers:
        recomputed = config.training.recompute_layers or shape.num_layers
        num = 0 if config.training.recompute == "none" else recomputed
        kept = float(kept_bytes(shape, config.training.recompute, num, 1, item))
        if config.training.offload:  # waits in host memory
            kept -= num * shape.kept(config.training.recompute) * item
    else:
        (short, few), (long, many) = (count_kept(parts.policy, size) for size in _COUNTED_TOKENS)
        kept = (many - few) / (long - short)
    dense = backward_bytes(shape, 0, item)
    return kept + backward_bytes(shape, 1, item) - dense, dense if parts.policy.has_kernel_layers else 0


def count_kept(policy: Policy, num_tokens: int) -> tuple[int, int]:
    """Packed tokens of a small forward, and bytes of the storages that autograd keeps for its backward pass."""
    sample = TrainingSample(
        group_id="plan",
        prompt_token_ids=(1,) * num_tokens,
        token_ids=(1,) * num_tokens,
        sampling_logprobs=(-1.0,) * num_tokens,
        advantages=(1.0,) * num_tokens,
        loss_mask=(True,) * num_tokens,
    )
    (microbatch,) = pack([sample], tokens_per_microbatch=2 * num_tokens, device=policy.device)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = policy.hidden(microbatch)
    hidden.float().sum().backward()
    for parameter in policy.parameters():
        parameter.grad = None
    return len(microbatch.token_ids), sum(kept.values())


def _head_bytes(inputs: Inputs, parts: Parts, num_rows: int) -> int:
    """Workspace of the head: the reference's chunk on a CPU; on a GPU tiles, which are left out."""
    if inputs.config.hardware.profile == "gpu":
        return 0
    vocabulary, item = parts.policy.head_weight.shape[0], parts.policy.head_weight.element_size()
    return min(_HEAD_BYTES, num_rows * vocabulary * (8 + item))
