"""NF4 matrices of one input as rows of one, so that one launch makes them all dense.

Shapes: O out features, D in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from rlbench_kernels.nf4 import NestedAbsmax, Nf4Weight


def join_rows(weights: Sequence[Nf4Weight]) -> list[Nf4Weight]:
    """The weights copied as rows of one matrix, their `whole`, with the same dense values.

    Args:
        weights: [O_i, D] each.

    Returns:
        The weights as they are where they cannot be joined: they differ in D, dtype or blocks, or have blocks that hold
        parts of two rows (or blocks of blocks, parts of two weights).
    """
    first = weights[0]
    if not all(_fits(weight, first) for weight in weights) or not all(map(_ends_whole, weights[:-1])):
        return list(weights)
    nested = first.nested
    if nested is not None:
        parts = [weight.nested for weight in weights if weight.nested is not None]
        scales, offset = torch.cat([part.absmax for part in parts]), torch.cat([part.offset for part in parts])
        nested = NestedAbsmax(scales, nested.code, offset, nested.blocksize)
    ends = [0, *accumulate(weight.shape[0] for weight in weights)]
    packed, absmax = torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights])
    whole = Nf4Weight(packed, absmax, (ends[-1], first.shape[1]), first.dtype, first.blocksize, nested)
    return [whole.rows(*bounds) for bounds in pairwise(ends)]


def _fits(weight: Nf4Weight, first: Nf4Weight) -> bool:
    """Whether it can follow `first`."""
    same = (weight.shape[1], weight.dtype, weight.blocksize, weight.device)
    if same != (first.shape[1], first.dtype, first.blocksize, first.device) or weight.shape[1] % weight.blocksize:
        return False
    nested, other = weight.nested, first.nested
    if nested is None or other is None:
        return nested is other
    same_blocks = nested.blocksize == other.blocksize and nested.first_block == other.first_block == 0
    return same_blocks and torch.equal(nested.code, other.code)


def _ends_whole(weight: Nf4Weight) -> bool:
    """Whether its last block of blocks is full, so that the next weight's begins behind it."""
    return weight.nested is None or weight.absmax.shape[0] % weight.nested.blocksize == 0
