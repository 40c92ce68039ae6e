"""All weights of a model in the tensors of vLLM's own: read as views, written in place.

vLLM fuses linear layers of one input (q, k, v; gate, up) into rows of one matrix, as its model's table says, and may
add rows to the vocabulary. On a CPU it repacks linear weights for its kernels and drops the tensors: those are written
by packing them again. Nothing here imports vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlbench.models.weights import Weights, check_weights, copy_weights


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the parameter of a checkpoint lies in vLLM's model."""

    module: nn.Module
    leaf: str  # weight | bias
    rows: slice
    shape: tuple[int, ...]
    is_repacked: bool  # there is no tensor to write

    def view(self) -> Tensor:
        return getattr(self.module, self.leaf).data[self.rows]


def held_weights(model: nn.Module) -> dict[str, Tensor]:
    """Live views of every parameter that is kept as a tensor, by its name in the checkpoint."""
    return {name: place.view() for name, place in _places(model).items() if not place.is_repacked}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Weights) -> None:
    """Copy in place; CUDA graphs stay valid.

    Raises:
        ValueError: names or shapes are not those of vLLM's model; nothing is changed then.
    """
    places = _places(model)
    check_weights(weights, {name: place.shape for name, place in places.items()})
    copy_weights(weights, {name: place.view() for name, place in places.items() if not place.is_repacked})
    repacked: dict[nn.Module, list[str]] = {}
    for name, place in places.items():
        if place.is_repacked:
            repacked.setdefault(place.module, []).append(name)
    for module, names in repacked.items():
        parts = [weights.tensors[name] for name in sorted(names, key=lambda name: places[name].rows.start)]
        empty: Any = module.weight
        module.weight = nn.Parameter(torch.cat(parts).to(empty), requires_grad=False)
    for module in model.modules():
        if hasattr(module, "cpu_linear"):  # packed on a CPU, with or without a tensor beside it
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator,union-attr]


def _places(model: nn.Module) -> dict[str, _Place]:
    places = {}
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for full_name, parameter in model.named_parameters():
        path, _, leaf = full_name.rpartition(".")
        parent, _, name = path.rpartition(".")
        module: Any = model.get_submodule(path)
        is_repacked = leaf == "weight" and not parameter.numel()
        parts = fused.get(name, [name])
        num_rows = _part_rows(module, parameter, len(parts))
        start = 0
        for part, count in zip(parts, num_rows, strict=True):
            shape = (count, module.input_size_per_partition) if is_repacked else (count, *parameter.shape[1:])
            key = ".".join(filter(None, (parent, part, leaf)))
            places[key] = _Place(module, leaf, slice(start, start + count), shape, is_repacked)
            start += count
    return places


def _part_rows(module: Any, parameter: Tensor, num_parts: int) -> list[int]:
    """Rows of each part of a fused layer; without those that pad a vocabulary."""
    if num_parts > 1 or not parameter.numel():
        return list(module.output_partition_sizes)
    return [getattr(module, "org_vocab_size", len(parameter))]
