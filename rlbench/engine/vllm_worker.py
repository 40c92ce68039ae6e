"""What vLLM's worker learns from us: adapter sync in place, LoRA as matmuls on a CPU, KV memory given back.

`AdapterWorker` is mixed into vLLM's own worker class by `LLM(worker_extension_cls=...)`; the engine calls its methods
by `collective_rpc`. Nothing here imports vllm.

Shapes: N tokens, R rank of vLLM's slots (at least the adapter's rank).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlbench.engine.dense_copies import LinearLayer
from rlbench.engine.merged_adapter import MergedAdapterCalls
from rlbench.engine.vllm_full_weights import held_weights, write_weights
from rlbench.engine.vllm_sampler import report_plain_logprobs
from rlbench.models.shared_base import EngineWeight
from rlbench.models.weights import Weights
from rlbench_kernels import ScaledCopies


@dataclass(frozen=True, slots=True)
class AdapterSlot:
    """Where one linear layer of the checkpoint keeps its LoRA weights inside vLLM's stacked buffers."""

    layer: Any  # vLLM's LoRA layer, which may fuse several linear layers of the checkpoint
    part: int  # 0, 1, 2 for q, k, v; 0, 1 for gate, up; else 0

    def lora_a(self, index: int) -> Tensor:
        """[R, in_features], the live buffer."""
        return self.layer.lora_a_stacked[self.part][index, 0]

    def lora_b(self, index: int) -> Tensor:
        """[out_features, R], the live buffer."""
        return self.layer.lora_b_stacked[self.part][index, 0]


@dataclass(frozen=True, slots=True)
class CopyTargets:
    """Views of the stacked buffers that an adapter of these ranks fills; the buffers stay where they are."""

    index: int  # of the LoRA in the buffers
    ranks: dict[str, int]  # of every layer that the adapter names
    scaling: float
    names: list[str]  # those that have a slot
    copies: ScaledCopies  # into A [rank, in] of each name, then B [out, rank] of each
    zeroed: list[Tensor]  # the rest of the buffers


class AdapterWorker(MergedAdapterCalls):
    """Mixed into vLLM's worker. Every name starts with `rlbench_`, so that none can meet one of vLLM's own."""

    model_runner: Any

    def rlbench_slot_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(in_features, out_features, R) of every linear layer that can be adapted, by its path in the checkpoint."""
        shapes = {}
        for name, slot in _adapter_slots(self._rlbench_manager()).items():
            rank, in_features = slot.lora_a(0).shape
            shapes[name] = (in_features, slot.lora_b(0).shape[0], rank)
        return shapes

    def rlbench_write_adapter(
        self, adapter_id: int, lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor], scaling: float
    ) -> None:
        """Copy the adapter into the buffers of the loaded LoRA `adapter_id`; layers that it does not name get zeros.

        The scaling is folded into B in float32, before the cast to the buffers' dtype. Shapes were checked before.
        """
        index = self._rlbench_manager().lora_index_to_id.index(adapter_id)
        ranks = {name: tensor.shape[0] for name, tensor in lora_a.items()}
        targets = self.__dict__.get("rlbench_targets")
        if targets is None or (targets.index, targets.ranks, targets.scaling) != (index, ranks, scaling):
            targets = self.__dict__["rlbench_targets"] = _copy_targets(self._rlbench_manager(), index, ranks, scaling)
        targets.copies([lora_a[name] for name in targets.names] + [lora_b[name] for name in targets.names])
        if targets.zeroed:
            torch._foreach_zero_(targets.zeroed)

    def rlbench_has_adapter(self, adapter_id: int) -> bool:
        """Whether the buffers still belong to `adapter_id`: vLLM would reload an evicted one from its (empty) file."""
        return adapter_id in self._rlbench_manager().lora_index_to_id

    def rlbench_held_adapter(self, adapter_id: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Live A [R, in] and scaled B [out, R] of every slot, by the linear layer's path in the checkpoint."""
        manager = self._rlbench_manager()
        index = manager.lora_index_to_id.index(adapter_id)
        slots = _adapter_slots(manager)
        return {n: s.lora_a(index) for n, s in slots.items()}, {n: s.lora_b(index) for n, s in slots.items()}

    def rlbench_report_plain_logprobs(self) -> None:
        """From now on a request for one more logprob gets the plain one; see `PlainLogprobs`."""
        report_plain_logprobs(self.model_runner.sampler)

    def rlbench_use_matmuls(self) -> None:
        """Compute LoRA by two matmuls a layer part instead of vLLM's CPU path; see `OneAdapterMatmul`."""
        for layer in self._rlbench_manager().modules.values():
            if hasattr(layer, "lora_a_stacked") and isinstance(layer.lora_a_stacked, tuple):
                layer.punica_wrapper = OneAdapterMatmul(layer.punica_wrapper)

    def rlbench_release_kv_cache(self) -> None:
        """Give back the memory of keys and values; their content is lost."""
        self.__dict__["rlbench_kv_bytes"] = {id_: s.nbytes() for id_, s in self._rlbench_kv_storages()}
        for _, storage in self._rlbench_kv_storages():
            storage.resize_(0)

    def rlbench_take_kv_cache(self) -> None:
        """Take the memory of keys and values again, filled with zeros."""
        num_bytes: dict[int, int] = self.__dict__["rlbench_kv_bytes"]
        for id_, storage in self._rlbench_kv_storages():
            storage.resize_(num_bytes[id_])
        for cache in self.model_runner.kv_caches:
            cache.zero_()

    def rlbench_base_weights(self) -> dict[str, EngineWeight]:
        """Every parameter of vLLM's model under its checkpoint's name, fused ones under vLLM's; no copies."""
        return {
            name.replace(".base_layer.", "."): EngineWeight(parameter.data, _nf4_parts(parameter))
            for name, parameter in self.model_runner.get_model().named_parameters()
        }

    def rlbench_held_weights(self) -> dict[str, Tensor]:
        """Every parameter by its name in the checkpoint, a view of vLLM's tensor; without what a CPU repacked."""
        return held_weights(self.model_runner.get_model())

    def rlbench_write_weights(self, weights: Weights) -> None:
        """Copy all weights into vLLM's own, see `rlbench.engine.vllm_full_weights`."""
        write_weights(self.model_runner.get_model(), weights)

    def _rlbench_kv_storages(self) -> list[tuple[int, torch.UntypedStorage]]:
        storages = [cache.untyped_storage() for cache in self.model_runner.kv_caches]
        return list({storage._cdata: storage for storage in storages}.items())

    def _rlbench_manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager


class OneAdapterMatmul:
    """Stands in for a LoRA layer's punica wrapper where a batch is all with or all without the one adapter.

    vLLM's CPU path gathers a copy of A and B for every token ([N, R, in]): SmolLM2-135M in bf16, rank 16, 64 sequences
    generate at 41 tokens/s with it.
    """

    def __init__(self, wrapper: Any) -> None:
        """
        Args:
            wrapper: vLLM's own `PunicaWrapperCPU`, which still learns about every batch.
        """
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[:, part] += x A^T B^T for every fused part; x [N, in], y [N, out], in place."""
        assert scale == 1.0
        if self._wrapper.no_lora:
            return
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + width].addmm_(x @ a[0, 0].T, b[0, 0].T)
            start += width


def _copy_targets(manager: Any, index: int, ranks: dict[str, int], scaling: float) -> CopyTargets:
    slots = _adapter_slots(manager)
    names = [name for name in slots if name in ranks]
    copied = [slots[name].lora_a(index)[: ranks[name]] for name in names]
    copied += [slots[name].lora_b(index)[:, : ranks[name]] for name in names]
    rests = [slots[name].lora_a(index)[ranks[name] :] for name in names]
    rests += [slots[name].lora_b(index)[:, ranks[name] :] for name in names]
    for name in slots.keys() - ranks.keys():
        rests += [slots[name].lora_a(index), slots[name].lora_b(index)]
    copies = ScaledCopies(copied, [1.0] * len(names) + [scaling] * len(names))
    return CopyTargets(index, ranks, scaling, names, copies, [rest for rest in rests if rest.numel()])


def _adapter_slots(manager: Any) -> dict[str, AdapterSlot]:
    """Slots by the linear layer's path in the checkpoint, e.g. "model.layers.0.self_attn.q_proj"."""
    slots = {}
    for name, layer in manager.modules.items():
        if not isinstance(getattr(layer, "lora_a_stacked", None), tuple):
            continue
        for part, part_name in enumerate(manager.packed_modules.get(name, [name])):
            slots[part_name] = AdapterSlot(layer, part)
    return slots


def linear_layers(model: nn.Module, *, only_nf4: bool) -> list[LinearLayer]:
    """Every linear layer of vLLM's model but the head; or those alone whose weight bitsandbytes quantised.

    Raises:
        ValueError: a layer that fuses other matrices than vLLM's table of its model says.
    """
    found = []
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for full_name, layer in model.named_modules():
        weight, path = layer._parameters.get("weight"), full_name.removesuffix(".base_layer")
        states = [state for _, state in _nf4_parts(weight)]
        if weight is None or not (states or (not only_nf4 and is_linear(layer))):
            continue
        parent, _, name = path.rpartition(".")
        num_rows: Any = [state.shape[0] for state in states] or layer.output_partition_sizes
        names = [".".join(filter(None, (parent, part))) for part in fused.get(name, [name])]
        if len(names) != len(num_rows):
            raise ValueError(f"engine.dense_copies: vLLM fuses {len(num_rows)} matrices in {path}, expected {names}")
        depth = states[0].shape[1] if states else weight.shape[1]
        pairs = zip(names, map(int, num_rows), strict=True)
        found.append(LinearLayer(layer, EngineWeight(weight.data, _nf4_parts(weight)), tuple(pairs), depth))
    return found


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer of vLLM's and no table of a vocabulary."""
    return hasattr(layer, "output_partition_sizes") and not hasattr(layer, "org_vocab_size")


def _nf4_parts(parameter: Any) -> tuple[tuple[Tensor, Any], ...]:
    """(bytes, QuantState) of every matrix in a parameter that vLLM quantised with bitsandbytes; else nothing."""
    states = getattr(parameter, "bnb_quant_state", None)
    if states is None:
        return ()
    ends = [int(end) for end in parameter.bnb_shard_offsets]
    return tuple((parameter.data[ends[i] : ends[i + 1]], states[i]) for i in range(len(states)))
