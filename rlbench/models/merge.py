"""An adapter merged into dense weights, W + s B A in float32, rounded once; and what rounding keeps of the change.

To nearest, a change below half a step of the written dtype (of bfloat16 2^-9 of the weight) is lost. Stochastically, a
sum goes up with the probability of its distance from the lower neighbour: any change is kept in expectation, for the
price of noise. The draws are hashes of the adapter's fingerprint, the matrix' name and the place in it.

Shapes: O out features, D in features, R rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.models.adapter import Adapter, check_adapter
from rlbench_kernels.merge_lora import round_stochastically

_NUMBERS = 2**22  # of a matrix at once: stochastic rounding takes several int64 copies of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """To the dtype that is written.

    Example:
        Rounding(dtype=torch.bfloat16, is_stochastic=True, fingerprint="9f2c01aa83b1d07e")
    """

    dtype: torch.dtype  # bfloat16 or float32, which takes a float32 sum as it is
    is_stochastic: bool = False
    fingerprint: str = ""  # of the adapter, for the draws

    def __call__(self, values: Tensor, name: str, first_row: int) -> Tensor:
        """float32 [O, D] rows of the matrix `name`, from `first_row` on, in `dtype`."""
        if not self.is_stochastic or self.dtype == torch.float32:
            return values.to(self.dtype)
        digest = hashlib.sha256(f"{self.fingerprint}:{name}:{first_row}".encode()).digest()
        return round_stochastically(values, int.from_bytes(digest[:4], "big"))


@dataclass(slots=True)
class Survival:
    """The change C = s B A of all matrices against what the written weights hold of it, D = written - W; float64."""

    change_squared: float = 0.0  # |C|^2
    projected: float = 0.0  # <D, C>
    error_squared: float = 0.0  # |D - C|^2

    def add(self, change: Tensor, written: Tensor) -> None:
        """Of one part of a matrix: C and D."""
        change, written = change.double(), written.double()
        self.change_squared += float(change.square().sum())
        self.projected += float((written * change).sum())
        self.error_squared += float((written - change).square().sum())

    @property
    def share(self) -> float:
        """<D, C> / |C|^2: 1 if the change is all there, noise besides it not counted; nan if nothing was to change."""
        return self.projected / self.change_squared if self.change_squared else math.nan

    @property
    def relative_error(self) -> float:
        """|D - C| / |C|, noise counted; nan if nothing was to change."""
        return math.sqrt(self.error_squared / self.change_squared) if self.change_squared else math.nan


@torch.no_grad()
def merge_(base: PreTrainedModel, adapter: Adapter, rounding: Rounding) -> Survival:
    """Add the adapter to the base in place, in float32, unrounded; measure what `round_` will keep.

    Args:
        base: dense, float32.
        adapter: on the base's device.
        rounding: of a later `round_`.

    Raises:
        ValueError: the adapter does not fit, or it would change a table that another layer uses too.
    """
    weights = _adapted_weights(base, adapter)
    found = Survival()
    for name, weight in weights.items():
        lora_a, lora_b = adapter.lora_a[name].float(), adapter.lora_b[name].float()
        for start, rows in _parts(weight):
            change = (lora_b[start : start + len(rows)] @ lora_a).mul_(adapter.scaling)
            before = rows.clone()
            rows.add_(change)
            found.add(change, rounding(rows, name, start).float() - before)
    return found


@torch.no_grad()
def round_(base: PreTrainedModel, adapter: Adapter | None, rounding: Rounding) -> None:
    """Round a float32 model in place, still held in float32: what the adapter changed as `rounding` says.

    All other tensors go to the nearest number, which of a base that was in the written dtype is itself.
    """
    adapted = {id(weight): name for name, weight in _adapted_weights(base, adapter).items()} if adapter else {}
    for parameter in base.parameters():
        name = adapted.get(id(parameter))
        if name is None:
            parameter.copy_(parameter.to(rounding.dtype))
        else:
            for start, rows in _parts(parameter):
                rows.copy_(rounding(rows, name, start))


def _adapted_weights(base: PreTrainedModel, adapter: Adapter) -> dict[str, Tensor]:
    """[O, D] by module path."""
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    check_adapter(adapter, {name: (module.out_features, module.in_features) for name, module in linear.items()})
    embedding = base.get_input_embeddings().weight
    for name in adapter.lora_a:
        weight = linear[name].weight
        assert weight.dtype == torch.float32, (name, weight.dtype)
        if weight is embedding:
            raise ValueError(
                f"the adapter changes {name}, whose weight is that of the embedding too (tie_word_embeddings); merged "
                "it would change both; expected lora.targets without it, or --format adapter"
            )
    return {name: linear[name].weight for name in adapter.lora_a}


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and live rows, a few million numbers at a time."""
    size = max(1, _NUMBERS // weight.shape[1])
    for start in range(0, len(weight), size):
        yield start, weight.data[start : start + size]
