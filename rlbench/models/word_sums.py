"""Sums of a tensor's bytes that tell two states of it apart, computed where the tensor lies."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
_CHUNK = 2**20  # words that are weighted at once: limits the int64 copies


def word_sum(tensor: Tensor) -> Tensor:
    """int64 []: the sum of the bytes as words of up to 64 bits, modulo 2**64; words that swap places keep it."""
    return _words(tensor).sum(dtype=torch.int64)


def placed_word_sum(tensor: Tensor) -> Tensor:
    """int64 []: sum over i of (2 i + 1) word_i, modulo 2**64; two different words that swap places change it."""
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        total += (part * torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=tensor.device)).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    """[W] of the widest integer dtype that the tensor's length and place allow."""
    flat = tensor.detach().contiguous().flatten()
    offset, num_bytes = flat.storage_offset() * flat.element_size(), flat.numel() * flat.element_size()
    dtype = next(dtype for size, dtype in _WORDS if offset % size == 0 and num_bytes % size == 0)
    return flat.view(dtype)
