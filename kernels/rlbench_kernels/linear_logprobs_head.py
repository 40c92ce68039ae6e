"""What turns hidden states into scores over the vocabulary, and the gradients of its tensors.

Shapes: N rows, D hidden, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.lora_linear import Lora


@dataclass(frozen=True, slots=True)
class Head:
    """scores = softcap * tanh(logits / softcap) / temperature, logits = hidden W^T + scaling (hidden A^T) B^T + bias.

    Tokens whose score is below their row's `support` are outside of the softmax, except for the target.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float | Tensor  # or float32 [N]
    softcap: float | None
    support: Tensor | None = None  # float32 [N]
    lora: Lora | None = None  # A [R, D], B [V, R]

    def rows(self, rows: slice) -> Head:
        """The head with the temperatures and supports of `rows`."""
        temperature, support = self.temperature, self.support
        if isinstance(temperature, Tensor):
            temperature = temperature[rows]
        if support is not None:
            support = support[rows]
        return replace(self, temperature=temperature, support=support)

    def cast_lora(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [R, D] and scaling B [V, R] in `dtype`; the scaling is multiplied in before the cast."""
        assert self.lora is not None
        return self.lora.a.detach().to(dtype), (self.lora.b.detach() * self.lora.scaling).to(dtype)


@dataclass(slots=True)
class Gradients:
    """Where gradients go, None where they are not wanted; all but `hidden` are sums in the accumulation dtype."""

    hidden: Tensor | None = None  # [N, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [R, D]
    lora_b: Tensor | None = None  # [V, R], of scaling B

    @classmethod
    def of(cls, hidden: Tensor, head: Head, wanted: tuple[bool, ...]) -> Gradients:
        """Zeros (hidden: empty) for each of (hidden, weight, bias, A, B) that is wanted."""
        a, b = (None, None) if head.lora is None else head.lora[:2]
        dtype = accumulation_dtype(hidden.dtype)
        sums = [
            torch.zeros_like(tensor, dtype=dtype) if is_wanted and tensor is not None else None
            for tensor, is_wanted in zip((head.weight, head.bias, a, b), wanted[1:], strict=True)
        ]
        return cls(torch.empty_like(hidden) if wanted[0] else None, *sums)

    def rows(self, rows: slice) -> Gradients:
        """The same sums, and those rows of hidden."""
        return replace(self, hidden=None if self.hidden is None else self.hidden[rows])

    def in_order(self, head: Head) -> tuple[Tensor | None, ...]:
        """(hidden, weight, bias, A, B), each in the dtype of its tensor."""
        a, b, scaling = head.lora or (None, None, 1.0)
        of_b = None if self.lora_b is None else self.lora_b * scaling
        pairs = ((self.weight, head.weight), (self.bias, head.bias), (self.lora_a, a), (of_b, b))
        return self.hidden, *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_head(hidden: Tensor, head: Head) -> None:
    """
    Raises:
        ValueError: shapes, dtypes or ranges that do not fit.
    """
    weight, num_rows = head.weight, len(hidden)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] expected, got {[*hidden.shape]} and {[*weight.shape]}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight need one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if isinstance(head.temperature, Tensor):
        if head.temperature.shape != (num_rows,):
            raise ValueError(f"temperature: a number or [{num_rows}] expected, got {[*head.temperature.shape]}")
    elif head.temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {head.temperature}")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {head.softcap}")
    if head.bias is not None and head.bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: [{len(weight)}] expected, got {[*head.bias.shape]}")
    _check_support(head.support, num_rows, accumulation_dtype(hidden.dtype))
    if head.lora is not None:
        _check_lora(head.lora, weight)


def _check_support(support: Tensor | None, num_rows: int, dtype: torch.dtype) -> None:
    if support is not None and (support.shape != (num_rows,) or support.dtype != dtype or support.requires_grad):
        raise ValueError(
            f"support: {dtype} [{num_rows}] without gradient expected, got {support.dtype} {[*support.shape]} "
            f"{support.requires_grad=}"
        )


def _check_lora(lora: Any, weight: Tensor) -> None:
    if not isinstance(lora, Lora):
        raise ValueError(f"lora: Lora(a [R, D], b [V, R], scaling) expected, got {type(lora).__name__}")
    a, b, size, depth = lora.a, lora.b, *weight.shape
    if a.ndim != 2 or a.shape[1] != depth or b.shape != (size, len(a)) or not len(a):
        raise ValueError(
            f"lora: A [R, {depth}] and B [{size}, R], R > 0, expected, got {[*a.shape]} and {[*b.shape]}"
        )  # fmt: skip
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"lora: A and B need floating dtypes, got {a.dtype} and {b.dtype}")
