"""`logprobs` on CUDA: each row is cut into blocks, every block a program; a small kernel joins their sums.

A block holds its logits in registers: one read, one exponential each. The cut depends on V alone, so a row gives the
same bits in any batch.

Shapes: N rows, V vocabulary, BLOCKS blocks of a row.
Source: joining the sums, Milakov and Gimelshein, arXiv 1805.02867.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv, next_power_of_2

# N = 8192, V = 128256 on an H200, of the copy bandwidth: 0.76, backward 0.97. Blocks of 8192 took 1.6 times as long on
# an H100, with more instructions than the forward pass has now.
_BLOCK, _GRADIENT_BLOCK = 1024, 4096
_ELEMENTS_PER_THREAD = 32
_JOINED_ROWS = 8
_MINUS_INF = tl.constexpr(float("-inf"))
_FLOOR = tl.constexpr(-1e4)  # exp2 of it is 0, and 0 times it is no nan
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_scores(logits, inverse_temperatures, stride, vocabulary, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """A block's scores, -inf outside of the row; its row and columns."""
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    return z * tl.load(inverse_temperatures + row), row, column


@triton.jit(do_not_specialize=["num_rows"])
def _sum_blocks(
    sums, logits, targets, inverse_temperatures, stride, vocabulary, num_rows, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [3, BLOCKS, N] = (highest score, sum e, sum e (s - highest)), e = exp(s - highest), 0 at the target.

    Few instructions a logit, by which the kernel is bound: powers of two, and the target is looked for in its own block
    alone.
    """
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = (tl.program_id(0) % BLOCKS) * BLOCK
    column = first + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    inverse = tl.load(inverse_temperatures + row)
    top = tl.max(z, 0)
    gap = (z - tl.where(top == _MINUS_INF, 0.0, top)) * (inverse * _LOG2_E)
    gap = tl.maximum(gap, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(gap)
    target = (tl.load(targets + row) - first).to(tl.int32)
    if (target >= 0) & (target < BLOCK):
        e = tl.where(tl.arange(0, BLOCK) == target, 0.0, e)
    place = (tl.program_id(0) % BLOCKS).to(tl.int64) * num_rows + row
    size = num_rows.to(tl.int64) * BLOCKS
    tl.store(sums + place, top * inverse)
    tl.store(sums + size + place, tl.sum(e, 0))
    tl.store(sums + 2 * size + place, tl.sum(e * gap, 0) * _LN_2)


@triton.jit
def _log1p_of_exp(x):
    """log(1 + exp(x)) with small relative error."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, tl.log(1.0 + e))


@triton.jit(do_not_specialize=["num_rows"])
def _join_blocks(
    values, entropies, log_totals, sums, logits, targets, inverse_temperatures, stride, num_rows,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """logprob, entropy and log of the softmax's denominator, each [N]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row < num_rows
    size = num_rows.to(tl.int64) * BLOCKS
    target = tl.load(targets + row, mask=is_row, other=0)
    score = tl.load(logits + row * stride + target, mask=is_row, other=0.0).to(tl.float32)
    score *= tl.load(inverse_temperatures + row, mask=is_row, other=1.0)
    block = tl.arange(0, PADDED)[:, None]
    place = sums + row[None, :] + num_rows.to(tl.int64) * block
    mask = is_row[None, :] & (block < BLOCKS)
    highest = tl.load(place, mask=mask, other=float("-inf"))  # [PADDED, ROWS]
    reference = tl.maximum(score, tl.max(highest, 0))
    shift = highest - reference[None, :]
    factor = tl.exp(shift)
    totals = tl.load(place + size, mask=mask, other=0.0) * factor
    products = tl.load(place + 2 * size, mask=mask, other=0.0) * factor
    others = tl.sum(totals, 0)
    weighted = tl.sum(products + tl.where(totals > 0.0, totals * shift, 0.0), 0)
    gap = score - reference
    e = tl.exp(gap)
    total = others + e
    weighted += tl.where(e > 0.0, e * gap, 0.0)
    log_total = tl.log(total)
    tl.store(values + row, -_log1p_of_exp(tl.log(others) - gap), mask=is_row)
    tl.store(entropies + row, log_total - weighted / total, mask=is_row)
    tl.store(log_totals + row, reference + log_total, mask=is_row)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 with small relative error."""
    near = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666667)))
    return tl.where(x > -0.03, near, 1.0 - tl.exp(x))


@triton.jit
def _logit_gradients(
    out, logits, targets, inverse_temperatures, values, entropies, log_totals, grads, grads_entropy, stride,
    vocabulary, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """out = (g (onehot - p) - g_entropy p (log p + entropy)) / temperature; 0 where both weights are."""
    scores, row, column = _load_scores(logits, inverse_temperatures, stride, vocabulary, BLOCKS, BLOCK)
    g, value = tl.load(grads + row), tl.load(values + row)
    is_target = column == tl.load(targets + row)
    log_p = tl.where(is_target, value, scores - tl.load(log_totals + row))
    p = tl.exp(log_p)
    result = tl.where(is_target, g * _one_minus_exp(value), -g * p)
    is_zero = g == 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(grads_entropy + row)
        result -= tl.where(p > 0.0, g_entropy * p * (log_p + tl.load(entropies + row)), 0.0)
        is_zero = is_zero & (g_entropy == 0.0)
    result = tl.where(is_zero, 0.0, result * tl.load(inverse_temperatures + row))
    target = out + row * vocabulary + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < vocabulary)


def launch_logprobs(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and log of the softmax's denominator, float32 [N]."""
    num_rows, vocabulary = logits.shape
    logits, inverse, options = _prepare(logits, temperature, _BLOCK)
    targets = targets.contiguous()
    blocks = options["BLOCKS"]
    sums = torch.empty((3, blocks, num_rows), dtype=torch.float32, device=logits.device)
    values, entropy, log_total = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    with torch.cuda.device_of(logits):
        _sum_blocks[(num_rows * blocks,)](
            sums, logits, targets, inverse, logits.stride(0), vocabulary, num_rows, **options
        )
        _join_blocks[(cdiv(num_rows, _JOINED_ROWS),)](
            values, entropy, log_total, sums, logits, targets, inverse, logits.stride(0), num_rows, BLOCKS=blocks,
            PADDED=next_power_of_2(blocks), ROWS=_JOINED_ROWS, num_warps=4,
        )  # fmt: skip
    return values, entropy, log_total


def launch_logprob_gradients(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, values: Tensor, entropy: Tensor, log_total: Tensor,
    grad: Tensor, grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    """d logits [N, V], contiguous."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    num_rows, vocabulary = logits.shape
    logits, inverse, options = _prepare(logits, temperature, _GRADIENT_BLOCK)
    with torch.cuda.device_of(logits):
        _logit_gradients[(num_rows * options["BLOCKS"],)](
            out, logits, targets.contiguous(), inverse, values, entropy, log_total, grad.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(), logits.stride(0), vocabulary,
            HAS_ENTROPY=grad_entropy is not None, **options,
        )  # fmt: skip
    return out


def _prepare(logits: Tensor, temperature: float | Tensor, largest: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Logits with adjacent columns, 1 / temperature [N], and the cut of a row."""
    num_rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if isinstance(temperature, Tensor):
        inverse = temperature.float().reciprocal().contiguous()
    else:
        inverse = torch.full((num_rows,), 1.0 / temperature, dtype=torch.float32, device=logits.device)
    block = min(largest, next_power_of_2(vocabulary))
    options = {
        "BLOCKS": cdiv(vocabulary, block),
        "BLOCK": block,
        "num_warps": max(1, block // 32 // _ELEMENTS_PER_THREAD),
    }
    return logits, inverse, options
