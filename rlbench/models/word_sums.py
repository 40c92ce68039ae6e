"""Sums of a tensor's bytes that tell two states of it apart, computed where the tensor lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
_CHUNK = 2**20  # words that are weighted at once: limits the int64 copies


def word_sum(tensor: Tensor) -> Tensor:
    """int64 []: the sum of the bytes as words of up to 64 bits, modulo 2**64; words that swap places keep it."""
    return _words(tensor).sum(dtype=torch.int64)


def placed_word_sums(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor the sum over i of (2 i + 1) word_i, modulo 2**64; two different words that swap places change it.

    One wait for the device in all. The tensors may lie on different devices, and the sums are the same on each.
    """
    factors: dict[torch.device, Tensor] = {}
    sums = []
    for tensor in tensors:
        words = _words(tensor)
        if words.device not in factors:
            factors[words.device] = torch.arange(1, 2 * _CHUNK, 2, device=words.device)
        sums.append(_placed_word_sum(words, factors[words.device]))
    return torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []


def _placed_word_sum(words: Tensor, factors: Tensor) -> Tensor:
    if not len(words):
        return torch.zeros((), dtype=torch.int64, device=words.device)
    parts = []
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        parts.append((part * factors[: len(part)]).sum())
        if start:
            parts.append(2 * start * part.sum())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _words(tensor: Tensor) -> Tensor:
    """[W] of the widest integer dtype that the tensor's length allows."""
    flat = tensor.detach().contiguous().flatten()
    num_bytes = flat.numel() * flat.element_size()
    size, dtype = next((size, dtype) for size, dtype in _WORDS if num_bytes % size == 0)
    if flat.storage_offset() * flat.element_size() % size:
        flat = flat.clone()  # a view of wider words must begin at one
    return flat.view(dtype)
