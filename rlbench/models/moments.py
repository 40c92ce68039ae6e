"""Bytes of the optimizer's state, by arithmetic from the shapes of what it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlbench.config.optim import OptimConfig

# Numbers of a tensor from which bitsandbytes keeps 8 bits of each, and from which it pages: `get_state_buffer` of
# https://github.com/bitsandbytes-foundation/bitsandbytes at 0.50.2.
_LEAST_8BIT = 4096
_LEAST_PAGED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentBytes:
    """
    Example:
        MomentBytes(device=8_192, paged=8_388_608)
    """

    device: int = 0
    paged: int = 0  # in memory that GPU and host share; the driver moves it to the host where the GPU is full

    def __add__(self, other: MomentBytes) -> MomentBytes:
        return MomentBytes(device=self.device + other.device, paged=self.paged + other.paged)


def count_moments(
    shapes: Iterable[Sequence[int]], config: OptimConfig, *, tables: Iterable[Sequence[int]] = ()
) -> MomentBytes:
    """Of the state that `rlbench.training.optim.make_optimizer`'s optimizer keeps of tensors with these shapes.

    Counts of steps and the scales of 8 bits (a float32 for 256 numbers) are left out; GaLore's stand-ins are counted.

    Args:
        shapes: of all that are trained but `tables`.
        tables: shapes of embeddings and the head, which Muon and GaLore leave to AdamW.
    """
    total = sum((_moments(math.prod(shape), config) for shape in tables), MomentBytes())
    for shape in shapes:
        numbers = math.prod(shape)
        if config.name == "muon" and is_matrix(shape):
            total += MomentBytes(device=4 * numbers)
        elif config.name.startswith("galore") and is_matrix(shape) and min(shape) > config.galore.rank:
            low = math.prod(low_shape(shape, config.galore.rank))
            own = 4 * (low + min(shape) * config.galore.rank)  # the stand-in and the basis
            total += _moments(low, config) + MomentBytes(device=own)
        else:
            total += _moments(numbers, config)
    return total


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether Muon and GaLore may treat a tensor as one: rows and columns, e.g. a value head, are none."""
    return len(shape) == 2 and min(shape) > 1


def low_shape(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Of a matrix's gradient that GaLore projected."""
    rows, columns = shape
    return (rank, columns) if rows <= columns else (rows, rank)


def _moments(numbers: int, config: OptimConfig) -> MomentBytes:
    """Both of AdamW."""
    size = 2 * numbers * (1 if "8bit" in config.name and numbers >= _LEAST_8BIT else 4)
    return MomentBytes(paged=size) if config.is_paged and numbers >= _LEAST_PAGED else MomentBytes(device=size)
