"""`linear_logprobs` on CUDA: library matmuls over vocabulary tiles, one Triton kernel a tile, float32 logits.

A tile's float32 logits are read once. The kernel updates each row's softmax sums and overwrites the logits by
e = exp(score - reference), 0 at the target, in the input dtype; a second matmul adds e W to a float32
accumulator [n, D].
The reference is the maximum of the first tile and moves only when a later score is more than 40 above it, so the
accumulator is almost never scaled. The target's term is added in float32 at the end.

A LoRA pair's product is in the tile before W's is added to it: the second access to the tile lies in the large
matmul's epilogue, and W is not copied, as it would be for one matmul [hidden | low] [W | B]^T.

Shapes: N rows, n rows of one chunk, D hidden, V vocabulary, R LoRA rank.
Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867; accumulation as in FlashAttention, arXiv 2205.14135.
"""

# pyright does not know kernel launches, nor out_dtype of addmm
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv, next_power_of_2
from rlbench_kernels.linear_logprobs_head import Gradients, Head
from rlbench_kernels.linear_logprobs_reference import to_scores

_MAX_ROWS = 4096
_MAX_TILE = 8192  # 4096 rows of float32: 128 MiB; the fastest of 4096 to 16384 on an H100 (D=4096, V=128256)
_LAZY = tl.constexpr(40.0)
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _load_scores(
    logits, bias, column, mask, inverse_temperature, support, targets, row, softcap, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SUPPORT: tl.constexpr,
):  # fmt: skip
    """Scores and softcap slopes of one row of a tile; -inf outside of mask and support, slope 1 outside of the mask."""
    z = tl.load(logits, mask=mask, other=float("-inf"))
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_CAP:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
        slope = 1.0 - tanh * tanh
        z = tl.where(mask, softcap * tanh, float("-inf"))
    scores = z * inverse_temperature
    if HAS_SUPPORT:
        is_outside = (scores < tl.load(support + row)) & (column != tl.load(targets + row))
        scores = tl.where(is_outside, float("-inf"), scores)
    return scores, slope


@triton.jit(do_not_specialize=["with_gradient"])
def _fold_tile(
    logits, narrow, bias, targets, inverse_temperatures, support, state, accumulator, start, width, stride, rows,
    D: tl.constexpr, softcap,
    with_gradient,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SUPPORT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Row program: fold one tile into state [4, n] = (reference, sum e, sum e (s - reference), target score).

    `with_gradient` is 0 or 1 at run time: one compiled kernel for both gives the same bits with and without it.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    scores, slope = _load_scores(
        logits + row * stride + column, bias, start + column, mask, tl.load(inverse_temperatures + row), support,
        targets, row, softcap, HAS_BIAS, HAS_CAP, HAS_SUPPORT,
    )  # fmt: skip
    is_target = start + column == tl.load(targets + row)
    highest = tl.max(scores, 0)
    if HAS_SUPPORT:
        highest = tl.maximum(highest, _LOWEST)  # a tile may hold none of it
    target_score = tl.sum(tl.where(is_target & mask, scores, 0.0), 0)
    if IS_FIRST:
        reference = highest
        factor = 1.0
        total = 0.0
        weighted = 0.0
    else:
        old = tl.load(state + row)
        total = tl.load(state + rows + row)
        weighted = tl.load(state + 2 * rows + row)
        target_score += tl.load(state + 3 * rows + row)
        reference = tl.where(highest > old + _LAZY, highest, old)
        factor = tl.exp(old - reference)
        weighted = factor * (weighted + tl.where(factor == 1.0, 0.0, old - reference) * total)
        total *= factor
    gap = scores - reference
    e = tl.where(is_target | (column >= width), 0.0, tl.exp(gap))
    total += tl.sum(e, 0)
    weighted += tl.sum(tl.where(mask & (e > 0.0), e * gap, e), 0)
    tl.store(state + row, reference)
    tl.store(state + rows + row, total)
    tl.store(state + 2 * rows + row, weighted)
    tl.store(state + 3 * rows + row, target_score)
    if with_gradient:
        tl.debug_barrier()
        tl.store(narrow + row * stride * NARROW + column, (e * slope).to(narrow.dtype.element_ty), mask=mask)
        if not IS_FIRST:
            if factor != 1.0:
                for first in range(0, D, BLOCK_D):
                    d = first + tl.arange(0, BLOCK_D)
                    value = tl.load(accumulator + row * D + d, mask=d < D, other=0.0)
                    tl.store(accumulator + row * D + d, value * factor, mask=d < D)


@triton.jit
def _hidden_gradient(
    out, accumulator, weight, targets, inverse_temperatures, state, grads, rows, D: tl.constexpr, softcap,
    BLOCK_D: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Row program: out = grad / T ((1 - p_target) slope W[target] - accumulator / total); 0 where grad is 0."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad, inverse_temperature = tl.load(grads + row), tl.load(inverse_temperatures + row)
    others, target_score = tl.load(state + rows + row), tl.load(state + 3 * rows + row)
    total = others + tl.exp(target_score - tl.load(state + row))
    slope = 1.0
    if HAS_CAP:
        tanh = target_score / (inverse_temperature * softcap)
        slope = 1.0 - tanh * tanh
    mean = tl.load(accumulator + row * D + d, mask=d < D, other=0.0) / total
    target = tl.load(weight + tl.load(targets + row) * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = grad * inverse_temperature * (others / total * slope * target - mean)
    tl.store(out + row * D + d, tl.where(grad == 0.0, 0.0, value).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _logit_gradient(
    logits, narrow, bias, targets, inverse_temperatures, support, log_totals, entropies, grads, grads_entropy, start,
    width, stride, softcap, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SUPPORT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Row program: a tile's logits become g (onehot - p) - g_entropy p (log p + entropy), times slope / T."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    inverse_temperature = tl.load(inverse_temperatures + row)
    scores, slope = _load_scores(
        logits + row * stride + column, bias, start + column, mask, inverse_temperature, support, targets, row, softcap,
        HAS_BIAS, HAS_CAP, HAS_SUPPORT,
    )  # fmt: skip
    g, g_entropy = tl.load(grads + row), tl.load(grads_entropy + row)
    log_p = scores - tl.load(log_totals + row)
    p = tl.exp(log_p)
    value = -p * (g + g_entropy * (log_p + tl.load(entropies + row)))
    value = tl.where(p > 0.0, value, 0.0) + tl.where(start + column == tl.load(targets + row), g, 0.0)
    value = tl.where((g == 0.0) & (g_entropy == 0.0), 0.0, value * slope * inverse_temperature)
    tl.debug_barrier()
    tl.store(narrow + row * stride * NARROW + column, value.to(narrow.dtype.element_ty), mask=mask)


class TritonSoftmax:
    """As `ReferenceSoftmax`, on CUDA; hidden float32 or bfloat16 or float16. No host synchronisation."""

    def __init__(self, hidden: Tensor, head: Head, max_rows: int = 0) -> None:
        """
        Args:
            hidden: [N, D].
            head: of V tokens.
            max_rows: of one chunk; 0 takes as many as are fast here.
        """
        vocabulary = head.weight.shape[0]
        num_tiles = -(-vocabulary // _MAX_TILE)
        self.width = min(vocabulary, -(-vocabulary // num_tiles // 128) * 128)
        self.max_rows = max(1, min(len(hidden), max_rows or _MAX_ROWS))
        self.head = head
        self.chunks = [slice(i, min(i + self.max_rows, len(hidden))) for i in range(0, len(hidden), self.max_rows)]
        self.tiles = [(s, min(s + self.width, vocabulary)) for s in range(0, vocabulary, self.width)]
        self._lora = None if head.lora is None else head.cast_lora(hidden.dtype)
        self._stride = -(-self.width // 8) * 8
        self._block = {"BLOCK": next_power_of_2(self.width), "num_warps": 16 if self.width > 4096 else 4}

    @cached_property
    def _logits(self) -> Tensor:
        """A tile's logits, float32 [n, tile]."""
        return self._hidden.new_empty((self.max_rows, self._stride), dtype=torch.float32)

    @cached_property
    def _narrow(self) -> Tensor:
        """The same memory in the input dtype."""
        return self._logits.view(self._hidden.dtype)

    @cached_property
    def accumulator(self) -> Tensor:
        """Sum of e W over the vocabulary, float32 [n, D]."""
        return self._hidden.new_empty((self.max_rows, self._hidden.shape[1]), dtype=torch.float32)

    def forward(self, hidden: Tensor, targets: Tensor, rows: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """logprobs [n] and entropy [n], float32."""
        self._hidden, self._targets, self._rows = hidden, targets.contiguous(), rows
        self._inverse, self._support = self._row_inputs(rows, len(hidden))
        self._low = None if self._lora is None else hidden @ self._lora[0].T  # [n, R]
        self._state = torch.empty((4, len(hidden)), dtype=torch.float32, device=hidden.device)
        self._fold(with_gradient)
        reference, others, weighted, target_score = self._state
        gap = target_score - reference
        e = gap.exp()
        total = others + e
        entropy = total.log() - (weighted + torch.where(e > 0, e * gap, e)) / total
        self._log_total, self._entropy = reference + total.log(), entropy
        # the target stays out of the sum: exact also where its probability is nearly 1
        self._logprobs = torch.where(others == 0, others, -torch.logaddexp(others.log() - gap, torch.zeros_like(gap)))
        return self._logprobs, entropy

    def _fold(self, with_gradient: bool) -> None:
        """Fill state [4, n] = (reference, sum e, sum e (score - reference), target score), and the accumulator."""
        n, depth = self._hidden.shape
        accumulator = self.accumulator if with_gradient else None
        for start, end in self.tiles:
            self._tile_logits(start, end)
            _fold_tile[(n,)](
                self._logits, self._narrow, self.head.bias, self._targets, self._inverse, self._support,
                self._state, self._state if accumulator is None else accumulator,  # a pointer to compile with; not read
                start, end - start, self._stride, n, depth, self.head.softcap or 0.0, int(with_gradient),
                BLOCK_D=1024, IS_FIRST=start == 0, **self._flags_of_head(), **self._block,
            )  # fmt: skip
            if accumulator is not None:
                values = self._narrow[:n, : end - start]
                multiply(values, self.head.weight[start:end], accumulator[:n], is_added=start > 0)

    def hidden_gradient(self, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, out: Tensor) -> None:
        """As `ReferenceSoftmax.hidden_gradient`; a gradient of the entropy computes the logits again."""
        n, depth = out.shape
        if grad_entropy is not None:
            self.add_gradients(grad_logprobs, grad_entropy, Gradients(hidden=out))
        elif grad_logprobs is None:
            out.zero_()
        else:
            _hidden_gradient[(n, cdiv(depth, 1024))](
                out, self.accumulator, self.head.weight, self._targets, self._inverse, self._state,
                grad_logprobs.contiguous(), n, depth, self.head.softcap or 0.0, BLOCK_D=1024,
                HAS_CAP=self.head.softcap is not None,
            )  # fmt: skip

    def other_probs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """As `ReferenceSoftmax.other_probs`, from logits computed again. Without LoRA or support."""
        hidden, targets = self._hidden[rows], self._targets[rows, None]
        scores = hidden.new_empty((len(hidden), len(self.head.weight)), dtype=torch.float32)
        multiply(hidden, self.head.weight.T, scores)
        slope = to_scores(scores, self.head.rows(self._rows).rows(rows))
        probs = scores.sub_(self._log_total[rows, None]).exp_().scatter_(1, targets, 0.0)
        target_weight = -torch.expm1(self._logprobs[rows])
        if slope is not None:
            target_weight = target_weight * slope.gather(1, targets)[:, 0]
            probs.mul_(slope)
        return probs, target_weight

    def add_gradients(self, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, to: Gradients) -> None:
        """Write the hidden gradient, add the others. After `forward`."""
        n, depth = self._hidden.shape
        zeros = torch.zeros_like(self._entropy)
        g, g_entropy = (zeros if x is None else x.contiguous() for x in (grad_logprobs, grad_entropy))
        inputs = self._hidden
        if to.weight is not None or self._lora is not None:
            inputs = inputs.masked_fill(((g == 0) & (g_entropy == 0))[:, None], 0.0)
        accumulator = None if to.hidden is None else inputs.new_empty((n, depth), dtype=torch.float32)
        lora = None if self._lora is None else _LoraGradients(*self._lora, inputs, to)
        for start, end in self.tiles:
            self._tile_logits(start, end)
            _logit_gradient[(n,)](
                self._logits, self._narrow, self.head.bias, self._targets, self._inverse, self._support,
                self._log_total, self._entropy, g, g_entropy, start, end - start, self._stride,
                self.head.softcap or 0.0, **self._flags_of_head(), **self._block,
            )  # fmt: skip
            part = self._narrow[:n, : end - start]
            if accumulator is not None:
                multiply(part, self.head.weight[start:end], accumulator, is_added=start > 0)
            if to.weight is not None:
                multiply(part.T, inputs, to.weight[start:end], is_added=True)
            if to.bias is not None:
                to.bias[start:end] += part.sum(0, dtype=torch.float32)
            if lora is not None:
                lora.add_tile(part, start, end)
        if lora is not None:
            lora.finish(accumulator)
        if to.hidden is not None:
            to.hidden.copy_(accumulator)

    def _tile_logits(self, start: int, end: int) -> None:
        logits = self._logits[: len(self._hidden), : end - start]
        if self._lora is not None:
            multiply(self._low, self._lora[1][start:end].T, logits)
        multiply(self._hidden, self.head.weight[start:end].T, logits, is_added=self._lora is not None)

    def _row_inputs(self, rows: slice, n: int) -> tuple[Tensor, Tensor | None]:
        """1 / temperature and support of the chunk, float32 [n]."""
        head = self.head.rows(rows)
        support = None if head.support is None else head.support.contiguous()
        if isinstance(head.temperature, Tensor):
            return head.temperature.float().reciprocal().contiguous(), support
        return torch.full((n,), 1.0 / head.temperature, dtype=torch.float32, device=self._hidden.device), support

    def _flags_of_head(self) -> dict[str, bool | int]:
        ratio = self._logits.element_size() // self._narrow.element_size()
        return {
            "HAS_BIAS": self.head.bias is not None, "HAS_CAP": self.head.softcap is not None,
            "HAS_SUPPORT": self._support is not None, "NARROW": ratio,
        }  # fmt: skip


class _LoraGradients:
    """What a chunk's logit gradients G [n, V] give to a LoRA pair, and through it to hidden: two skinny matmuls a tile.

    d low = G B, dA = d low^T hidden, dB = G^T low, d hidden += d low A.
    """

    def __init__(self, a: Tensor, b: Tensor, inputs: Tensor, to: Gradients) -> None:
        self._a, self._b, self._inputs, self._to = a, b, inputs, to
        self._low = inputs @ a.T  # [n, R], 0 in rows without gradient
        self._grad_low = inputs.new_zeros((len(inputs), len(a)), dtype=torch.float32)

    def add_tile(self, part: Tensor, start: int, end: int) -> None:
        """part [n, end - start]: G of these columns."""
        multiply(part, self._b[start:end], self._grad_low, is_added=True)
        if self._to.lora_b is not None:
            multiply(part.T, self._low, self._to.lora_b[start:end], is_added=True)

    def finish(self, accumulator: Tensor | None) -> None:
        """Add to the accumulator of hidden's gradient [n, D], and to A's."""
        grad_low = self._grad_low.to(self._inputs.dtype)
        if accumulator is not None:
            multiply(grad_low, self._a, accumulator, is_added=True)
        if self._to.lora_a is not None:
            multiply(grad_low.T, self._inputs, self._to.lora_a, is_added=True)


def triton_gradients(
    hidden: Tensor, head: Head, targets: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `reference_gradients`; the head's gradients are summed in float32."""
    gradients = Gradients.of(hidden, head, wanted)
    softmax = TritonSoftmax(hidden, head)
    for rows in softmax.chunks:
        softmax.forward(hidden[rows], targets[rows], rows, with_gradient=False)
        g, g_entropy = (None if grad is None else grad[rows] for grad in (grad_logprobs, grad_entropy))
        softmax.add_gradients(g, g_entropy, gradients.rows(rows))
    return gradients.in_order(head)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, is_added: bool = False) -> None:
    """out = left right, or out += left right; out float32."""
    kwargs = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
    if is_added:
        torch.addmm(out, left, right, out=out, **kwargs)
    else:
        torch.mm(left, right, out=out, **kwargs)
