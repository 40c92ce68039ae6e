"""The frozen part of `lora_linear`: matrices of one input, and how they are made dense.

Shapes: D in features, O_i out features, O their sum over the projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

from torch import Tensor

from rlbench_kernels.fp8 import Fp8Weight, dequantize_fp8
from rlbench_kernels.lora_dropout import LoraDropout
from rlbench_kernels.nf4 import Nf4Weight, dequantize_nf4

Base = Tensor | Nf4Weight | Fp8Weight


@dataclass(frozen=True, slots=True, eq=False)
class Projections:
    """The frozen part of some projections of one input."""

    bases: tuple[Base, ...]  # each [O_i, D]
    biases: tuple[Tensor | None, ...]  # each [O_i]
    scalings: tuple[float, ...]
    dropouts: tuple[LoraDropout | None, ...]  # of the input of A_i
    form: str
    sizes: list[int] = field(init=False)  # O_i
    whole: Nf4Weight | None = field(init=False)  # whose rows the bases are, all of them in order

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", [base.shape[0] for base in self.bases])
        object.__setattr__(self, "whole", _whole(self.bases))

    def dense(self, like: Tensor, wanted: Sequence[bool] | None = None) -> Iterator[Tensor]:
        """[O_i, D] in the dtype of `like`; a dense base as it is.

        Where the bases are no rows of one matrix they are made dense one after the other, and only those wanted.
        """
        wanted = [True] * len(self.bases) if wanted is None else wanted
        if self.whole is not None:
            dense = dequantize_nf4(self.whole, like.new_empty(self.whole.shape))
            yield from compress(dense.split(self.sizes), wanted)
            return
        for base in compress(self.bases, wanted):
            yield base if isinstance(base, Tensor) else _write_dense(base, like.new_empty(base.shape))

    def write(self, out: Tensor) -> None:
        """All bases into out [O, D], one below the other."""
        if self.whole is not None:
            dequantize_nf4(self.whole, out)
            return
        for part, base in zip(out.split(self.sizes), self.bases, strict=True):
            _write_dense(base, part)


def _whole(bases: Sequence[Base]) -> Nf4Weight | None:
    """The matrix that the bases make up, each of them rows of it behind those of the one before."""
    whole = bases[0].whole if isinstance(bases[0], Nf4Weight) else None
    row = 0
    for base in bases:
        if whole is None or not isinstance(base, Nf4Weight) or base.whole is not whole or base.first_row != row:
            return None
        row += base.shape[0]
    return whole if whole is not None and whole.shape[0] == row else None


def _write_dense(base: Base, out: Tensor) -> Tensor:
    if isinstance(base, Nf4Weight):
        return dequantize_nf4(base, out)
    if isinstance(base, Fp8Weight):
        return dequantize_fp8(base, out)
    return out.copy_(base)
