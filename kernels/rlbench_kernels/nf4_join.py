"""NF4 matrices of one input as rows of one, so that one launch makes them all dense.

Shapes: O out features, D in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rlbench_kernels.nf4 import NestedAbsmax, Nf4Weight


def join_rows(weights: Sequence[Nf4Weight], *, copy: bool) -> list[Nf4Weight]:
    """The weights as rows of one matrix, their `whole`, with the same dense values.

    Its scales are copied, 1/64 byte an element under double quantisation. Codes that lie behind one another, as in an
    engine's fused matrices, stay where they are.

    Args:
        weights: [O_i, D] each.
        copy: whether codes that lie elsewhere are copied too.

    Returns:
        The weights as they are where they cannot be joined: they differ in D, dtype or blocks, have blocks that hold
        parts of two rows (or blocks of blocks, parts of two weights), or lie elsewhere and `copy` is False.
    """
    first = weights[0]
    if not all(_fits(weight, first) for weight in weights) or not all(map(_ends_whole, weights[:-1])):
        return list(weights)
    packed = _joined_codes([weight.packed for weight in weights], copy=copy)
    if packed is None:
        return list(weights)
    nested = first.nested
    if nested is not None:
        parts = [weight.nested for weight in weights if weight.nested is not None]
        scales, offset = torch.cat([part.absmax for part in parts]), torch.cat([part.offset for part in parts])
        nested = NestedAbsmax(scales, nested.code, offset, nested.blocksize)
    ends = [0, *accumulate(weight.shape[0] for weight in weights)]
    absmax = torch.cat([weight.absmax for weight in weights])
    whole = Nf4Weight(packed, absmax, (ends[-1], first.shape[1]), first.dtype, first.blocksize, nested)
    return [whole.rows(*bounds) for bounds in pairwise(ends)]


def _joined_codes(parts: Sequence[Tensor], *, copy: bool) -> Tensor | None:
    """All of them behind one another, where they lie if they lie so."""
    first = parts[0]
    is_joined = all(
        left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.data_ptr() + left.numel() == right.data_ptr()
        for left, right in pairwise(parts)
    )
    if is_joined:
        return first.as_strided((sum(part.numel() for part in parts),), (1,))
    return torch.cat(list(parts)) if copy else None


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
