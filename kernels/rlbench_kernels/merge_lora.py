"""A LoRA update added to a bfloat16 matrix so that small updates are not lost: stochastic rounding.

W_ij <- round(W_ij + sum_r B_ir A_rj), the sum in float32. Rounded to nearest, an update below half a bfloat16 step
(2^-9 of the weight) would vanish, and the merged model would be the base. Here the sum is rounded up with the
probability of its distance from the lower neighbour, so that its expectation is exact and an element without update
keeps its bits. The draw of an element is a hash of a seed and its place: equal inputs give equal bits. A float32 matrix
takes the sum as it is.

Shapes: O out features, D in features, R rank.
Source: stochastic rounding, Gupta et al. 2015, arXiv:1502.02551, section 3; the hash is Chris Wellons' lowbias32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton

HASH_FACTORS = (0x7FEB352D, 0x846CA68B)
_WORD = 0xFFFFFFFF
_DTYPES = (torch.bfloat16, torch.float32)


@torch.no_grad()
def merge_lora_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, seed: int) -> Tensor:
    """Add B A to the weight in place, rounding stochastically; one launch on CUDA.

    Args:
        weight: [O, D], bfloat16 or float32, unit stride along D.
        lora_a: [R, D], in the weight's dtype.
        lora_b: [O, R], in the weight's dtype; a scaling is folded in before.
        seed: 0 to 2^32 - 1, of the draws.

    Returns:
        `weight`.

    Raises:
        ValueError: another dtype, shape, device or layout, or a seed out of range.
    """
    _check(weight, lora_a, lora_b, seed)
    if not weight.numel() or not lora_a.numel():
        return weight
    if weight.dtype == torch.float32:
        return weight.addmm_(lora_b, lora_a)
    if use_triton(weight.device):
        from rlbench_kernels.merge_lora_triton import launch_merge

        launch_merge(weight, lora_a, lora_b, seed)
        return weight
    update = lora_b.float() @ lora_a.float()
    return weight.copy_(round_stochastically(weight.float().add_(update), seed))


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """float32 [O, D] as bfloat16: each to one of its two neighbours, in expectation itself."""
    places = torch.arange(values.numel(), device=values.device).view(values.shape)
    draws = hash_places(places, seed) >> 16  # 0 to 2^16 - 1, what bfloat16 cuts off
    bits = (values.contiguous().view(torch.int32).long() & _WORD) + draws
    return (bits >> 16).to(torch.uint16).view(torch.bfloat16)


def hash_places(places: Tensor, seed: int) -> Tensor:
    """int64 0 to 2^32 - 1 for each place (int64, only its low 32 bits count)."""
    x = (places ^ seed) & _WORD
    x = x ^ (x >> 16)
    x = (x * HASH_FACTORS[0]) & _WORD
    x = x ^ (x >> 15)
    x = (x * HASH_FACTORS[1]) & _WORD
    return x ^ (x >> 16)


def _check(weight: Tensor, lora_a: Tensor, lora_b: Tensor, seed: int) -> None:
    tensors = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in tensors.items():
        kind = (tensor.dtype, tensor.ndim, tensor.device)
        if tensor.dtype not in _DTYPES or kind != (weight.dtype, 2, weight.device):
            found = f"{tensor.dtype} {[*tensor.shape]} on {tensor.device}"
            raise ValueError(f"{name}: a bfloat16 or float32 matrix, as the weight, on {weight.device}; got {found}")
    (num_rows, depth), rank = weight.shape, lora_a.shape[0]
    if lora_a.shape != (rank, depth) or lora_b.shape != (num_rows, rank):
        raise ValueError(
            f"A {[*lora_a.shape]} and B {[*lora_b.shape]} for a weight [{num_rows}, {depth}]: expected "
            f"[R, {depth}] and [{num_rows}, R]"
        )
    if depth > 1 and weight.stride(1) != 1:
        raise ValueError(f"weight: unit stride along its columns expected, got strides {weight.stride()}")
    if not 0 <= seed <= _WORD:
        raise ValueError(f"seed: 0 to {_WORD} expected, got {seed}")
