"""`rope` on CUDA: one launch rotates all heads of q and k; the inverse is the same kernel with the other sign.

Shapes: T tokens, H heads, half = hd / 2.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import next_power_of_2

_MAX_TILE = 4096  # elements of each half that a program holds at a time


@triton.jit
def _rotate_heads(
    out, x, token, stride, head_stride, c, s, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads of one token; c and s [1, BLOCK]."""
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(0, H, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < H) & (column < HALF)
        source = x + token * stride + head * head_stride + column
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        target = out + token * (H * HALF * 2) + head * (HALF * 2) + column
        tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    q_out, k_out, q, k, cos, sin, q_stride, q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride, sign,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Token program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    c = tl.load(cos + token * cos_stride + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + column, mask=column < HALF, other=0.0).to(tl.float32) * sign
    _rotate_heads(q_out, q, token, q_stride, q_head_stride, c, s, HQ, HALF, BLOCK_HQ, BLOCK)
    _rotate_heads(k_out, k, token, k_stride, k_head_stride, c, s, HK, HALF, BLOCK_HK, BLOCK)


def launch_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_inverse: bool) -> tuple[Tensor, Tensor]:
    """New q [T, Hq, hd] and k [T, Hk, hd], rotated by the angles or back."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    block = next_power_of_2(q.shape[2] // 2)
    heads = [min(next_power_of_2(x.shape[1]), max(1, _MAX_TILE // block)) for x in (q, k)]
    with torch.cuda.device_of(q):
        _rotate[(q.shape[0],)](
            q_out, k_out, q, k, cos, sin, *_strides(q), *_strides(k), _strides(cos)[0], _strides(sin)[0],
            -1.0 if is_inverse else 1.0, HQ=q.shape[1], HK=k.shape[1], HALF=q.shape[2] // 2, BLOCK_HQ=heads[0],
            BLOCK_HK=heads[1], BLOCK=block, num_warps=min(8, max(1, heads[0] * block // 512)),
        )  # fmt: skip
    return q_out, k_out


def _strides(x: Tensor) -> tuple[int, ...]:
    """All but the last; 0 for the first where there is one token, so that T decides no compilation."""
    return (x.stride(0) if x.shape[0] > 1 else 0, *x.stride()[1:-1])
