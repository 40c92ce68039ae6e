"""The sparse hidden gradient of `linear_logprobs`: likely columns exactly, the others of a block as one shared vector.

For a block of m rows K are the columns whose probability exceeds eps in any row. With P = p slope, 0 at the target,
sum over v of P_iv W_v becomes

    sum over v in K of P_iv W_v + t_i q W,   t_i = sum over v not in K of P_iv,   q_v = sum_i w_i P_iv / sum_i w_i t_i

so that the sum over the block of w_i times the error is 0. Rows whose weights w differ in sign have a q of their own
each. The error of a row is at most 2 |g_i| t_i / T_i max_v |W_v|.

Shapes: N rows, n rows of one chunk, m rows of one block, D hidden, V vocabulary, K columns kept.
Source: the filter of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009), with what it drops added back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlbench_kernels.linear_logprobs_head import Head, accumulation_dtype


class SparseStats(NamedTuple):
    """What the sparse gradient of one call left out: float32 [] on the device, over blocks or over rows with weight."""

    kept_frac: Tensor  # share of the head's rows that were multiplied, mean of blocks; 1 in a block that fell back
    tail_mass: Tensor  # probability (times the softcap's slope) that went through the shared vector, mean of rows
    tail_mass_max: Tensor  # the same, the largest of any row
    fallback_frac: Tensor  # blocks that were computed densely


@dataclass(slots=True)
class SparseGradient:
    """Options of `grad="sparse"`, and the report of the last call that computed a gradient with them.

    Example:
        sparse = SparseGradient(eps=3e-5)
        logprobs, _ = linear_logprobs(hidden, weight, targets, grad="sparse", sparse=sparse)
        float(sparse.stats.tail_mass)

    Raises:
        ValueError: a number outside of its range.
    """

    eps: float = 6e-5  # columns with a probability above it in any row of the block are exact; 0 <= eps < 1
    block_rows: int = 128  # consecutive rows that share columns and q, at most; > 0
    # Of the vocabulary, 0 to 1; a block that keeps more is computed densely. In the fused form so are all chunks after
    # one in which every block kept more.
    max_kept_frac: float = 0.5
    # float [N], proportional to the gradients that the logprobs will get, signs included: sums over a block are
    # unbiased under these weights. None: equal weights. A row of weight 0 must get gradient 0, any other becomes nan.
    row_weights: Tensor | None = None
    stats: SparseStats | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps of the sparse gradient: 0 <= eps < 1 expected, got {self.eps}")
        if self.block_rows < 1:
            raise ValueError(f"block_rows of the sparse gradient must be above 0, got {self.block_rows}")
        if not 0 <= self.max_kept_frac <= 1:
            raise ValueError(f"max_kept_frac of the sparse gradient: 0 to 1 expected, got {self.max_kept_frac}")


class ChunkSoftmax(Protocol):
    """A softmax after the `forward` of a chunk."""

    def other_probs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """For rows of the chunk p slope [m, V], 0 at the target and free to be overwritten, and (1 - p) slope [m] of
        the target; accumulation dtype. Once for each row."""
        ...


class BlockCounts(NamedTuple):
    """What some blocks kept and left out."""

    kept: list[float]  # share of the head's rows that each block multiplied; 1 where it fell back
    num_fallbacks: int
    tail_mass: Tensor  # of each row, float [m]
    is_active: Tensor  # bool [m]: has weight


@runtime_checkable
class SparseSoftmax(Protocol):
    """A softmax with a sparse gradient of its own, for a whole chunk."""

    def write_sparse(self, options: SparseGradient, weights: Tensor, factors: Tensor, out: Tensor) -> BlockCounts:
        """out [n, D] = factors d logprob / d hidden, 0 where the factor is 0; weights [n] are the shared vectors'."""
        ...


class SparseWriter:
    """Writes the hidden gradient chunk by chunk, and adds up the statistics on the device."""

    def __init__(self, options: SparseGradient, device: torch.device) -> None:
        self._options, self._device = options, device
        self._kept_frac = self._num_blocks = self._num_fallbacks = 0.0
        self._tail_mass, self._num_rows, self._tail_mass_max = torch.zeros(3, device=device)  # rows with weight

    def write(
        self, softmax: ChunkSoftmax | SparseSoftmax, head: Head, targets: Tensor, rows: slice, out: Tensor
    ) -> None:
        """out [n, D] = d logprob / d hidden of a chunk, nan where the row's weight is 0; after its forward pass.

        Waits for the number of columns kept: once a block, a `SparseSoftmax` once a chunk.

        Args:
            softmax: of the chunk.
            head: of the chunk's rows.
            targets: int64 [n].
            rows: of the chunk.
            out: [n, D].
        """
        ones = torch.ones(len(out), dtype=accumulation_dtype(out.dtype), device=out.device)
        weights = self._options.row_weights
        weights = ones if weights is None else weights.detach()[rows].to(ones)
        self._write(softmax, head, targets, weights, ones.masked_fill(weights == 0, torch.nan), out)

    def write_scaled(
        self, softmax: ChunkSoftmax | SparseSoftmax, head: Head, targets: Tensor, grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """out [n, D] = grad_logprobs d logprob / d hidden, 0 where the weight is 0; else as `write`.

        Raises:
            ValueError: the entropy has a gradient.
        """
        if grad_entropy is not None:
            refuse_entropy_gradient()
        if grad_logprobs is None:
            out.zero_()
        else:
            self._write(softmax, head, targets, grad_logprobs, grad_logprobs, out)

    def finish(self) -> None:
        """Put the statistics into the options."""
        num_blocks = max(self._num_blocks, 1.0)
        kept_frac, fallback_frac = (
            torch.full((), value / num_blocks, device=self._device) for value in (self._kept_frac, self._num_fallbacks)
        )
        tail_mass = self._tail_mass / self._num_rows.clamp(min=1.0)
        self._options.stats = SparseStats(kept_frac, tail_mass, self._tail_mass_max, fallback_frac)

    def _write(
        self, softmax: ChunkSoftmax | SparseSoftmax, head: Head, targets: Tensor, weights: Tensor, factors: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        """Weights [n] are those of the shared vectors, factors [n] those of the result."""
        if isinstance(softmax, SparseSoftmax):
            self._count(softmax.write_sparse(self._options, weights, factors, out))
            return
        for start in range(0, len(out), self._options.block_rows):
            rows = slice(start, min(start + self._options.block_rows, len(out)))
            block = head.rows(rows)
            probs, target_weight = softmax.other_probs(rows)
            is_active = weights[rows].isfinite() & (weights[rows] != 0) & target_weight.isfinite()  # [m]
            probs.masked_fill_(~is_active[:, None], 0.0)
            shares = torch.where(is_active, weights[rows] / block.temperature, 0.0)
            mean_row = self._mean_row(probs, block.weight, shares, is_active)  # [m, D]: sum over v of P_v W_v
            grad = block.weight[targets[rows]].to(probs.dtype).mul_(target_weight[:, None]).sub_(mean_row)
            factor = (factors[rows] / block.temperature)[:, None]
            out[rows] = torch.where(factor != 0, grad.mul_(factor), 0.0)

    def _mean_row(self, probs: Tensor, weight: Tensor, shares: Tensor, is_active: Tensor) -> Tensor:
        """[m, D] from probs [m, V], which it overwrites."""
        columns = (probs > self._options.eps).any(0).nonzero()[:, 0]
        is_dense = len(columns) > self._options.max_kept_frac * len(weight)
        if is_dense:
            mean_row = (probs.to(weight.dtype) @ weight).to(probs.dtype)
            tail_mass = torch.zeros_like(shares)
        else:
            values = probs.index_select(1, columns).to(weight.dtype)
            mean_row = (values @ weight.index_select(0, columns)).to(probs.dtype)
            tail_mass = _add_tail(mean_row, probs.index_fill_(1, columns, 0.0), weight, shares)
        kept = 1.0 if is_dense else len(columns) / len(weight)
        self._count(BlockCounts([kept], int(is_dense), tail_mass, is_active))
        return mean_row

    def _count(self, counts: BlockCounts) -> None:
        self._kept_frac += sum(counts.kept)
        self._num_blocks += len(counts.kept)
        self._num_fallbacks += counts.num_fallbacks
        self._tail_mass += counts.tail_mass.sum()
        self._num_rows += counts.is_active.sum()
        self._tail_mass_max = torch.maximum(self._tail_mass_max, counts.tail_mass.max().float())


def _add_tail(mean_row: Tensor, tail: Tensor, weight: Tensor, shares: Tensor) -> Tensor:
    """mean_row [m, D] += t q W for the sign of each row's share; returns t [m]. tail: [m, V], 0 in kept columns."""
    tail_mass = tail.sum(1)
    signed = torch.stack([shares.clamp(min=0), (-shares).clamp(min=0)])  # [2, m]
    totals = signed @ tail_mass  # [2]
    q = (signed @ tail) / torch.where(totals > 0, totals, 1.0)[:, None]  # [2, V]
    vectors = (q.to(weight.dtype) @ weight).to(mean_row.dtype)  # [2, D]
    mean_row.addcmul_(tail_mass[:, None], vectors[(shares < 0).long()])
    return tail_mass


def check_sparse(
    grad: str, sparse: SparseGradient | None, head: Head, num_rows: int, *, may_have_weights: bool
) -> SparseGradient | None:
    """The options of a sparse gradient, None for a dense one.

    Raises:
        ValueError: `grad` is unknown, or what it does not support is asked for.
    """
    if grad not in ("dense", "sparse"):
        raise ValueError(f"grad: 'dense' or 'sparse' expected, got {grad!r}")
    if grad == "dense":
        if sparse is not None:
            raise ValueError("sparse: options of the sparse gradient need grad='sparse', got grad='dense'")
        return None
    is_trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if head.lora is not None or (is_trained and torch.is_grad_enabled()):
        what = "a LoRA pair on it" if head.lora is not None else "weight or bias with requires_grad"
        raise ValueError(f"grad='sparse' needs a frozen head, got {what}: use grad='dense'")
    if head.support is not None:
        raise ValueError("grad='sparse' does not take a support, got one: use grad='dense'")
    if sparse is None:
        return SparseGradient()
    if not isinstance(sparse, SparseGradient):
        raise ValueError(f"sparse: SparseGradient expected, got {type(sparse).__name__}")
    weights = sparse.row_weights
    if weights is not None and not may_have_weights:
        raise ValueError(
            "row_weights of the sparse gradient: None expected, the loss's own gradients take their place; got a tensor"
        )
    device = head.weight.device
    if weights is not None and (
        weights.shape != (num_rows,) or not weights.is_floating_point() or weights.device != device
    ):
        raise ValueError(
            f"row_weights of the sparse gradient: floating [{num_rows}] on {device} expected, got {weights.dtype} "
            f"{[*weights.shape]} on {weights.device}"
        )
    return sparse


def refuse_entropy_gradient() -> None:
    """
    Raises:
        ValueError: always.
    """
    raise ValueError("grad='sparse' gives no gradient to the entropy, got one: detach the entropy or use grad='dense'")
