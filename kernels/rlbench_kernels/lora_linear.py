"""Linear layers with LoRA over frozen matrices: one autograd function a layer, query-key-value or MLP.

Gradients go to the input and the adapters alone. A matrix in NF4 or FP8 is made dense once a direction and never kept;
saved for the backward pass are the input, the MLP's gate and up, and the low-rank products. `values=False` is for a
second forward pass whose gradients alone are wanted (activation recomputation): what only the results need is left out,
and they hold anything.

Dropout acts on the input of A alone, as in PEFT: y = x W^T + (drop(x) A^T) (scaling B)^T. Each projection has a mask of
its own, those of one input too, for PEFT has a nn.Dropout a linear layer. A mask is drawn again from its seed in the
backward pass, so that nothing of its size is saved.

Shapes: N tokens, D in features, O out features, I intermediate features, R LoRA rank.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.lora_bases import Base, Projections
from rlbench_kernels.lora_dropout import LoraDropout, check_dropout
from rlbench_kernels.lora_gating import GATES, apply_gate, gate_gradients
from rlbench_kernels.lora_matmuls import (
    FORMS,
    Adapters,
    a_gradients,
    b_gradients,
    cast_adapters,
    input_gradient,
    low_gradient,
    low_products,
    project,
)

Dropouts = Sequence[LoraDropout | None] | None  # one a projection


class Lora(NamedTuple):
    """x A^T (scaling B)^T, of any floating dtype: it is cast to the input's, the scaling multiplied in before."""

    a: Tensor  # [R, D]
    b: Tensor  # [O, R]
    scaling: float


def lora_linear(
    x: Tensor, base: Base, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None = None,
    *, dropout: LoraDropout | None = None, form: str = "auto", cast: Adapters | None = None,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias + (drop(x) A^T) (scaling B)^T with W and bias frozen.

    Args:
        x: [..., D].
        base: W [O, D] in x's dtype, or in NF4 or FP8.
        lora_a, lora_b: [R, D] and [O, R], any floating dtype; their gradients have it too.
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: [O] in x's dtype, or None.
        dropout: see above; None, or p = 0: drop(x) = x.
        form: how the matmuls are grouped, see `lora_matmuls`; "auto" takes "accumulate" on a GPU, "two_pass" on a CPU
            and where there is a bias: an adapter of zeros then leaves the bits of x W^T + bias.
        cast: the adapter as `cast_adapters` would cast it; None has it done here.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, a base that asks for a gradient, or a dropout out of range.
    """
    return lora_qkv(x, [base], [Lora(lora_a, lora_b, scaling)], [bias], dropouts=[dropout], form=form, cast=cast)[0]


def lora_qkv(
    x: Tensor, bases: Sequence[Base], loras: Sequence[Lora | None], biases: Sequence[Tensor | None] | None = None,
    *, dropouts: Dropouts = None, form: str = "auto", values: bool = True, cast: Adapters | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Projections of one input, each as `lora_linear`, in one autograd function; None is a layer without adapter.

    In the form "extended" the results are column slices of one [..., sum O]: not to be modified in place.

    Args:
        x: [..., D].
        bases, loras, biases, dropouts: one a projection; as in `lora_linear`. Without adapter there is no dropout.
        values: False leaves the large matmuls out; see above.
        cast: as in `lora_linear`, of all projections.

    Returns:
        [..., O] of each projection.

    Raises:
        ValueError: as `lora_linear`.
    """
    biases = [None] * len(bases) if biases is None else biases
    _check(x, bases, loras, biases)
    frozen = _projections(bases, loras, biases, _applied(dropouts, loras), form, has_room=False)
    results = _LoraProjections.apply(x.reshape(-1, x.shape[-1]), frozen, (values, cast), *_tensors(loras))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in results)  # pyright: ignore[reportOptionalIterable]


def lora_mlp(
    x: Tensor, gate: Base, up: Base, down: Base, loras: Sequence[Lora | None], activation: str = "silu",
    *, dropouts: Dropouts = None, form: str = "auto", values: bool = True, overwrite: bool = False,
    casts: tuple[Adapters | None, Adapters | None] = (None, None),
) -> Tensor:  # fmt: skip
    """y = down(act(gate(x)) * up(x)), each projection as `lora_linear`, in one autograd function.

    Saves x, gate(x) and up(x); the product is computed again in the backward pass.

    Args:
        x: [..., D].
        gate, up: [I, D]. down: [O, I].
        loras, dropouts: of gate, up and down; as in `lora_qkv`.
        activation: "silu" or "gelu_tanh".
        form: as in `lora_linear`; on a GPU "auto" takes "extended" where all of gate and up, or down, are
            quantised.
        values: False leaves down and the product out; see above.
        overwrite: the backward pass writes its gradients over gate(x) and up(x), which saves N 3 I numbers at its
            peak; it can run once.
        casts: as in `lora_linear`, of gate and up, and of down.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: as `lora_linear`; an unknown activation.
        RuntimeError: a second backward pass after one that overwrote.
    """
    if activation not in GATES:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(GATES)}")
    if len(loras) != 3:
        raise ValueError(f"loras: of gate, up and down expected, got {len(loras)}")
    if gate.shape[0] != up.shape[0]:
        raise ValueError(f"gate and up have {gate.shape[0]} and {up.shape[0]} rows, expected the same number")
    _check(x, [gate, up], loras[:2], [None, None])
    _check(x, [down], loras[2:], [None], depth=gate.shape[0])
    applied = _applied(dropouts, loras)
    inner = _projections([gate, up], loras[:2], [None, None], applied[:2], form, has_room=True)
    outer = _projections([down], loras[2:], [None], applied[2:], form, has_room=True)
    options = (activation, values, overwrite, casts)
    y = _LoraMlp.apply(x.reshape(-1, x.shape[-1]), inner, outer, options, *_tensors(loras))
    return y.view(*x.shape[:-1], y.shape[-1])  # pyright: ignore[reportOptionalMemberAccess]


class _LoraProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, frozen: Projections, options: tuple[bool, Adapters | None], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        values, cast = options
        adapters = cast or cast_adapters(tensors, frozen.scalings, rows.shape[1], rows)
        if values:
            results, low = project(rows, adapters, frozen)
        else:
            results = [rows.new_empty((rows.shape[0], size)) for size in frozen.sizes]
            low = low_products(rows, adapters, frozen.dropouts)
        ctx.save_for_backward(rows, low, adapters.a, *adapters.b)
        ctx.frozen, ctx.dtypes = frozen, _dtypes(tensors)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        rows, low, a, *b = ctx.saved_tensors
        adapters, wanted = Adapters(a, tuple(b)), ctx.needs_input_grad
        low_grad = low_gradient(grads, adapters)
        grad_rows = input_gradient(grads, low_grad, adapters, ctx.frozen) if wanted[0] else None
        return (
            grad_rows,
            None,
            None,
            *_adapter_gradients(grads, low_grad, rows, low, adapters, ctx.frozen, ctx.dtypes, wanted[3:]),
        )


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, inner: Projections, outer: Projections, options: tuple[str, bool, bool, Any],
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        activation, values, ctx.overwrite, casts = options
        size = inner.sizes[0]
        adapters = casts[0] or cast_adapters(tensors[:4], inner.scalings, rows.shape[1], rows)
        last = casts[1] or cast_adapters(tensors[4:], outer.scalings, size, rows)
        # gate and up side by side, with room for d low where their gradients come to lie here
        both = rows.new_empty((rows.shape[0], 2 * size + (adapters.width if ctx.overwrite else 0)))
        _, low = project(rows, adapters, inner, out=both[:, : 2 * size])
        last_low = None
        if values:
            room = rows.new_empty((rows.shape[0], size + (last.width if outer.form == "extended" else 0)))
            hidden = apply_gate(both[:, : 2 * size], activation, out=room[:, :size])
            (y,), last_low = project(hidden, last, outer, room=room)
        else:
            y = rows.new_empty((rows.shape[0], outer.sizes[0]))
        ctx.save_for_backward(rows, both, low, last_low, adapters.a, last.a, *adapters.b, *last.b)
        ctx.inner, ctx.outer, ctx.activation, ctx.dtypes = inner, outer, activation, _dtypes(tensors)
        ctx.is_overwritten = False
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_overwritten:
            raise RuntimeError("lora_mlp: overwrite=True allows one backward pass, this is the second")
        ctx.is_overwritten = ctx.overwrite
        rows, both, low, last_low, a, last_a, *b = ctx.saved_tensors
        inner, outer, wanted = ctx.inner, ctx.outer, ctx.needs_input_grad
        adapters, last, width = Adapters(a, tuple(b[:2])), Adapters(last_a, tuple(b[2:])), 2 * inner.sizes[0]
        last_low_grad = low_gradient([grad], last)
        grad_hidden = input_gradient([grad], last_low_grad, last, outer)
        # dgate and dup side by side, with room for d low
        room = both if ctx.overwrite else rows.new_empty((rows.shape[0], width + adapters.width))
        hidden = gate_gradients(both[:, :width], grad_hidden, ctx.activation, out=room[:, :width])
        grads = room[:, :width].split(inner.sizes, 1)
        if last_low is None:
            last_low = low_products(hidden, last, outer.dropouts)
        last_gradients = _adapter_gradients(
            [grad], last_low_grad, hidden, last_low, last, outer, ctx.dtypes[2:], wanted[8:]
        )
        low_grad = low_gradient(grads, adapters, out=room[:, width:])
        grad_rows = input_gradient(grads, low_grad, adapters, inner, room=room) if wanted[0] else None
        gradients = _adapter_gradients(
            grads, low_grad, rows, low, adapters, inner, ctx.dtypes[:2], wanted[4:8]
        )  # fmt: skip
        return grad_rows, None, None, None, *gradients, *last_gradients


def _adapter_gradients(
    grads: Sequence[Tensor | None], low_grad: Tensor, rows: Tensor, low: Tensor, adapters: Adapters,
    frozen: Projections, dtypes: Sequence[torch.dtype], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """(dA_1, dB_1, dA_2, dB_2, ..), None where not wanted."""
    gradients: list[Tensor | None] = [None] * len(wanted)
    gradients[1::2] = b_gradients(grads, low, adapters, frozen.scalings, dtypes, wanted[1::2])
    if any(wanted[::2]):
        grads_a = a_gradients(low_grad, rows, adapters, frozen.dropouts, dtypes)
        parts = zip(grads_a, grads, wanted[::2], strict=True)
        gradients[::2] = [grad_a if is_wanted and grad is not None else None for grad_a, grad, is_wanted in parts]
    return gradients


def _projections(
    bases: Sequence[Base], loras: Sequence[Lora | None], biases: Sequence[Tensor | None],
    dropouts: tuple[LoraDropout | None, ...], form: str, *, has_room: bool,
) -> Projections:  # fmt: skip
    """The frozen part; "auto" decided. `has_room`: the buffers of "extended" cost no copies of activations."""
    if form not in (*FORMS, "auto"):
        raise ValueError(f"form {form!r}: expected one of auto, {', '.join(FORMS)}")
    if form == "auto":
        is_quantised = not any(isinstance(base, Tensor) for base in bases)
        form = "extended" if is_quantised and has_room and any(loras) else "accumulate"
        has_bias = any(bias is not None for bias in biases)  # cuBLAS rounds x W^T before it adds it to low B^T + bias
        form = "two_pass" if bases[0].device.type == "cpu" or has_bias else form
    scalings = tuple(1.0 if lora is None else lora.scaling for lora in loras)
    return Projections(tuple(bases), tuple(biases), scalings, dropouts, form)


def _applied(dropouts: Dropouts, loras: Sequence[Lora | None]) -> tuple[LoraDropout | None, ...]:
    """Those that drop something."""
    if dropouts is None:
        return (None,) * len(loras)
    if len(dropouts) != len(loras):
        raise ValueError(f"{len(dropouts)} dropouts, {len(loras)} loras: expected the same number")
    for i, dropout in enumerate(dropouts):
        if dropout is not None:
            check_dropout(dropout, f"dropout {i}")
    pairs = zip(dropouts, loras, strict=True)
    return tuple(dropout if dropout and dropout.p and lora else None for dropout, lora in pairs)


def _tensors(loras: Sequence[Lora | None]) -> list[Tensor | None]:
    return [tensor for lora in loras for tensor in ((None, None) if lora is None else (lora.a, lora.b))]


def _dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype]:
    """The dtype of each adapter's gradients."""
    return [torch.float32 if a is None else a.dtype for a in tensors[::2]]


def _check(
    x: Tensor, bases: Sequence[Base], loras: Sequence[Lora | None], biases: Sequence[Tensor | None],
    depth: int | None = None,
) -> None:  # fmt: skip
    depth = x.shape[-1] if depth is None else depth
    if not bases or not len(bases) == len(loras) == len(biases):
        raise ValueError(f"{len(bases)} bases, {len(loras)} loras, {len(biases)} biases: expected one number above 0")
    for i, (base, lora, bias) in enumerate(zip(bases, loras, biases, strict=True)):
        if len(base.shape) != 2 or base.shape[1] != depth:
            raise ValueError(f"base {i}: [O, {depth}] expected, got {[*base.shape]}")
        if isinstance(base, Tensor) and (base.dtype != x.dtype or base.requires_grad):
            raise ValueError(f"base {i}: frozen and {x.dtype} expected, got {base.dtype} {base.requires_grad=}")
        if lora is not None and (
            lora.a.ndim != 2 or lora.a.shape[1] != depth or lora.b.shape != (base.shape[0], len(lora.a))
            or lora.a.dtype != lora.b.dtype
        ):  # fmt: skip
            raise ValueError(
                f"lora {i}: A [R, {depth}] and B [{base.shape[0]}, R] of one dtype expected, got {[*lora.a.shape]} "
                f"{lora.a.dtype} and {[*lora.b.shape]} {lora.b.dtype}"
            )
        if bias is not None and (bias.shape != base.shape[:1] or bias.dtype != x.dtype or bias.requires_grad):
            raise ValueError(f"bias {i}: frozen {x.dtype} [{base.shape[0]}] expected, got {bias.dtype} {bias.shape}")
