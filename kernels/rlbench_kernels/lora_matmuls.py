"""The matmuls of `lora_linear`: projections of one input over frozen matrices, each with a low-rank addition.

y_i = x W_i^T + bias_i + (x A_i^T) (s_i B_i)^T. The low-rank products of all projections come from one matmul with the
stacked A. Three forms of the rest, with the same meaning:

- "two_pass": y_i = x W_i^T, then y_i += low_i B_i^T, which reads and writes y_i once more;
- "accumulate": y_i = low_i B_i^T, then y_i += x W_i^T: the second access to y_i lies in the large matmul's epilogue;
- "extended": one matmul [x | low] [W | s B]^T over all projections, B block-diagonal, in buffers made for it. It
  copies x, unless x was written into such a buffer, and W, which for a quantised matrix is its dequantisation.

Backward alike: "extended" is [dy_1 | dy_2 .. | dlow] [W_1; W_2; ..; A].

With dropout low_i is drop_i(x) A_i^T, a mask a projection as in PEFT, so that there is a matmul for each; the rest of
the forward pass is the same. Backward, the part of the gradient through A_i is dropped alike and added to that through
the W_i, whatever the form: a mask lies on the product dlow_i A_i, not on a factor, so that A is no row of "extended".
Where dy lies in a buffer for it, the W_i stay one matmul [dy_1 | dy_2 ..] [W_1; W_2; ..]; making one would copy dy.

Shapes: N tokens, D in features, O_i out features, R_i ranks, O and R their sums over the projections.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, starmap

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton
from rlbench_kernels.lora_bases import Projections
from rlbench_kernels.lora_dropout import LoraDropout, drop

FORMS = ("two_pass", "accumulate", "extended")
_ALIGNMENT = 16  # trailing columns: rows of 16-bit buffers stay multiples of 32 bytes; Triton vectorises for 16


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """Adapters of some projections in the compute dtype."""

    a: Tensor  # [R, D], stacked
    b: tuple[Tensor | None, ...]  # each [O_i, R_i], times the scaling; None without adapter
    rank: int = field(init=False)  # R
    columns: list[slice] = field(init=False)  # where each projection's ranks lie among R

    def __post_init__(self) -> None:
        ends = [0, *accumulate(0 if b is None else b.shape[1] for b in self.b)]
        object.__setattr__(self, "rank", ends[-1])
        object.__setattr__(self, "columns", list(starmap(slice, pairwise(ends))))

    def part(self, low: Tensor, index: int) -> Tensor:
        """The columns of projection `index` of low [N, R]."""
        columns = self.columns[index]
        return low if columns == slice(0, self.rank) else low[:, columns]

    @property
    def width(self) -> int:
        """R, rounded up to aligned trailing columns."""
        return -(-self.rank // _ALIGNMENT) * _ALIGNMENT


def cast_adapters(
    tensors: Sequence[Tensor | None], scalings: Sequence[float], depth: int, like: Tensor
) -> Adapters:  # fmt: skip
    """(A_1, B_1, A_2, B_2, ..) in the dtype of `like`; the scaling is multiplied in before the cast."""
    present = [a.to(like.dtype) for a in tensors[::2] if a is not None]
    if not present:
        stacked = like.new_empty((0, depth))
    else:
        stacked = present[0] if len(present) == 1 else torch.cat(present)
    scaled = [
        None if b is None else (b * scaling).to(like.dtype) for b, scaling in zip(tensors[1::2], scalings, strict=True)
    ]
    return Adapters(stacked, tuple(scaled))


def project(
    rows: Tensor, adapters: Adapters, frozen: Projections, *, out: Tensor | None = None, room: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The projections y_i [N, O_i] of rows [N, D], and low [N, R] for the backward pass.

    Args:
        out: [N, O] to write y_1, y_2, .. side by side into, or None for new tensors.
        room: a buffer [N, D + width] whose first columns are `rows`, or None. "extended" fills the others.
    """
    low = low_products(rows, adapters, frozen.dropouts)
    if frozen.form == "extended":
        depth, left = rows.shape[1], rows if room is None else None
        room = rows.new_empty((rows.shape[0], depth + adapters.width)) if room is None else room
        _write_side_by_side(room, left, low, depth)
        y = _multiply(room, _extended_weight(rows, adapters, frozen).T, _joined_bias(rows, frozen), out)
        return ([y] if len(frozen.bases) == 1 else list(y.split(frozen.sizes, 1))), low
    outs = [None] * len(frozen.bases) if out is None else out.split(frozen.sizes, 1)
    results = []
    parts = zip(frozen.dense(rows), frozen.biases, adapters.b, outs, strict=True)
    for i, (dense, bias, b, y) in enumerate(parts):
        factors = [(rows, dense.T)]
        if b is not None:
            factors.insert(0 if frozen.form == "accumulate" else 1, (adapters.part(low, i), b.T))
        y = _multiply(*factors[0], bias, y)
        for left, right in factors[1:]:
            y.addmm_(left, right)
        results.append(y)
    return results, low


def low_products(rows: Tensor, adapters: Adapters, dropouts: Sequence[LoraDropout | None]) -> Tensor:
    """low [N, R] = drop_i(rows) A_i^T, side by side."""
    if not any(dropouts):
        return rows @ adapters.a.T
    low = rows.new_empty((rows.shape[0], adapters.rank))
    for b, columns, dropout in zip(adapters.b, adapters.columns, dropouts, strict=True):
        if b is not None:
            torch.mm(drop(rows, dropout), adapters.a[columns].T, out=low[:, columns])
    return low


def low_gradient(grads: Sequence[Tensor | None], adapters: Adapters, out: Tensor | None = None) -> Tensor:
    """d low [N, R] = dy_i (s_i B_i), side by side; written to the first R columns of `out`, the others zeroed."""
    first, rank = next(grad for grad in grads if grad is not None), adapters.rank
    if out is None:
        out = first.new_empty((first.shape[0], rank))
    elif rank < out.shape[1]:
        out[:, rank:].zero_()
        out = out[:, :rank]
    for i, (grad, b) in enumerate(zip(grads, adapters.b, strict=True)):
        if b is not None and grad is not None:
            torch.mm(grad, b, out=adapters.part(out, i))
        elif b is not None:
            adapters.part(out, i).zero_()
    return out


def input_gradient(
    grads: Sequence[Tensor | None], low_grad: Tensor, adapters: Adapters, frozen: Projections,
    room: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d rows [N, D] from dy_i [N, O_i] and d low [N, R].

    Args:
        room: a buffer [N, O + width] that holds all of dy, d low and zeros, for "extended"; None has it made.
    """
    if any(frozen.dropouts):
        return _dropped_input_gradient(grads, low_grad, adapters, frozen, room)
    if frozen.form == "extended":
        if room is None:
            room = _stacked_gradients(grads, low_grad, adapters, frozen)
        return room @ _stacked_weight(low_grad, adapters, frozen)
    has_low = adapters.rank > 0
    start = low_grad @ adapters.a if frozen.form == "accumulate" and has_low else None
    result = _through_bases(grads, frozen, start)
    if frozen.form == "two_pass" and has_low:
        result.addmm_(low_grad, adapters.a)
    return result


def _dropped_input_gradient(
    grads: Sequence[Tensor | None], low_grad: Tensor, adapters: Adapters, frozen: Projections, room: Tensor | None
) -> Tensor:
    if frozen.form == "extended" and room is not None:
        size = sum(frozen.sizes)
        result = room[:, :size] @ _stacked_weight(low_grad, adapters, frozen)[:size]
    else:
        result = _through_bases(grads, frozen, None)
    for grad, columns, dropout in zip(grads, adapters.columns, frozen.dropouts, strict=True):
        if grad is not None and columns.start < columns.stop:
            drop(low_grad[:, columns] @ adapters.a[columns], dropout, add_to=result)
    return result


def _through_bases(grads: Sequence[Tensor | None], frozen: Projections, result: Tensor | None) -> Tensor:
    """[N, D]: the sum of dy_i W_i, added to `result` if there is one."""
    wanted = [grad is not None for grad in grads]
    present = [grad for grad in grads if grad is not None]
    for grad, dense in zip(present, frozen.dense(present[0], wanted), strict=True):
        result = grad @ dense if result is None else result.addmm_(grad, dense)
    assert result is not None
    return result


def a_gradients(
    low_grad: Tensor, rows: Tensor, adapters: Adapters, dropouts: Sequence[LoraDropout | None],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:  # fmt: skip
    """d A_i [R_i, D] = (d low_i)^T drop_i(rows); an empty tensor for a projection without adapter.

    Without dropout in one matmul.
    """
    wide = _wide(rows.dtype)
    parts = zip(adapters.columns, dropouts, dtypes, strict=True)
    if any(dropouts):
        return [
            _mm_in(low_grad[:, columns].T, drop(rows, dropout), wide).to(dtype) for columns, dropout, dtype in parts
        ]
    stacked = _mm_in(low_grad.T, rows, wide)
    if len(dtypes) == 1:
        return [stacked.to(dtypes[0])]
    return [stacked[columns].to(dtype) for columns, _, dtype in parts]


def b_gradients(
    grads: Sequence[Tensor | None], low: Tensor, adapters: Adapters, scalings: Sequence[float],
    dtypes: Sequence[torch.dtype], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """d B_i [O_i, R_i] = s_i dy_i^T low_i; None where not wanted. All scalings are multiplied in by one launch."""
    results: list[Tensor | None] = [None] * len(grads)
    found = {
        i: _mm_in(grad.T, adapters.part(low, i), _wide(grad.dtype))
        for i, grad in enumerate(grads)
        if grad is not None and wanted[i]
    }
    if found:
        torch._foreach_mul_([*found.values()], [scalings[i] for i in found])
    for i, product in found.items():
        results[i] = product.to(dtypes[i])
    return results


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _write_side_by_side(out: Tensor, left: Tensor | None, right: Tensor, depth: int) -> None:
    """out [N, D + width] = [left | right | zeros]; left None: the first D = `depth` columns stay as they are."""
    if use_triton(out.device):
        from rlbench_kernels.lora_matmuls_triton import launch_write

        launch_write(out, left, right, depth)
        return
    if left is not None:
        out[:, :depth] = left
    out[:, depth : depth + right.shape[1]] = right
    out[:, depth + right.shape[1] :].zero_()


def _extended_weight(rows: Tensor, adapters: Adapters, frozen: Projections) -> Tensor:
    """[O, D + width]: W_i, and s_i B_i in its own columns, zeros elsewhere."""
    depth = rows.shape[1]
    weight = rows.new_empty((sum(frozen.sizes), depth + adapters.width))
    frozen.write(weight[:, :depth])
    if len(adapters.b) == 1 and adapters.b[0] is not None:
        _write_side_by_side(weight, None, adapters.b[0], depth)
        return weight
    trailing = weight[:, depth:]
    trailing.zero_()
    for part, b, columns in zip(trailing.split(frozen.sizes), adapters.b, adapters.columns, strict=True):
        if b is not None:
            part[:, columns] = b
    return weight


def _stacked_weight(like: Tensor, adapters: Adapters, frozen: Projections) -> Tensor:
    """[O + width, D]: W_1, W_2, .., A, zeros."""
    size = sum(frozen.sizes)
    weight = like.new_empty((size + adapters.width, adapters.a.shape[1]))
    frozen.write(weight[:size])
    weight[size : size + adapters.rank] = adapters.a
    if adapters.rank < adapters.width:
        weight[size + adapters.rank :].zero_()
    return weight


def _stacked_gradients(
    grads: Sequence[Tensor | None], low_grad: Tensor, adapters: Adapters, frozen: Projections
) -> Tensor:
    sizes, depth = frozen.sizes, sum(frozen.sizes)
    room = low_grad.new_empty((low_grad.shape[0], depth + adapters.width))
    if len(grads) == 1:
        _write_side_by_side(room, grads[0], low_grad, depth)
        return room
    for part, grad in zip(room[:, :depth].split(sizes, 1), grads, strict=True):
        if grad is None:
            part.zero_()
        else:
            part.copy_(grad)
    _write_side_by_side(room, None, low_grad, depth)
    return room


def _joined_bias(rows: Tensor, frozen: Projections) -> Tensor | None:
    if all(bias is None for bias in frozen.biases):
        return None
    pairs = zip(frozen.biases, frozen.sizes, strict=True)
    return torch.cat([rows.new_zeros(size) if bias is None else bias for bias, size in pairs])


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """left right + bias, in `out` or a new tensor."""
    if out is None:
        return left @ right if bias is None else torch.addmm(bias, left, right)
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def _mm_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, accumulated and returned in `dtype` where the library can (16-bit factors on CUDA)."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return (left @ right).to(dtype)
