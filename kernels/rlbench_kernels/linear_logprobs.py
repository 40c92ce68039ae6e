"""Logprobs of target tokens straight from hidden states, without the [N, V] logits in memory.

Shapes: N rows, D hidden, V vocabulary, R LoRA rank, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton
from rlbench_kernels.linear_logprobs_head import Head, accumulation_dtype, check_head
from rlbench_kernels.linear_logprobs_reference import ReferenceSoftmax, reference_gradients
from rlbench_kernels.linear_logprobs_sparse import SparseGradient, SparseWriter, check_sparse, refuse_entropy_gradient
from rlbench_kernels.lora_linear import Lora

TokenLoss = Callable[[Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    support: Tensor | None = None,
    lora: Lora | None = None,
    grad: str = "dense",
    sparse: SparseGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """logprobs[i] = log_softmax(s[i])[targets[i]] and the entropy of softmax(s[i]), s = cap(hidden W^T + bias) / T.

    cap(z) = softcap * tanh(z / softcap). Both results are differentiable to hidden, weight, bias and the LoRA pair.
    With a frozen head d logprob / d hidden is computed in the forward pass and scaled in the backward pass: two
    matmuls. A gradient through the entropy, or to weight or bias, computes the logits a second time: four matmuls; one
    to the LoRA pair too, in three.
    With and without gradient the results have the same bits, and they are those of `linear_token_loss`.
    A row that gets gradient 0 receives gradient 0, whatever it holds: masked rows may be inf or nan.

    Args:
        hidden: [N, D], any floating dtype; tested in float32, bfloat16 and float64.
        weight: [V, D], same dtype.
        targets: int64 [N], 0 <= target < V; the range is not checked, which would wait for a GPU.
        temperature: > 0; a number or one per row, float32 [N].
        softcap: > 0, or None.
        bias: [V], or None.
        support: a score for each row, float32 [N] (float64 for float64 inputs), or None. Tokens whose s is lower are
            outside of the softmax: they have no probability, no entropy and no gradient. The target is always inside.
            -inf keeps every token. `support_thresholds` computes it for top_p, top_k and min_p. It gets no gradient.
        lora: adds scaling (hidden A^T) B^T to hidden W^T, A [R, D] and B [V, R] of any floating dtype, or None. W is
            neither copied nor changed, and may be frozen.
        grad: "dense", or "sparse": an approximate gradient to hidden in `linear_logprobs_sparse`'s way, for a frozen
            head without LoRA and support, and not through the entropy. The results keep their bits.
        sparse: options of the sparse gradient, which receive its statistics, or None for its defaults.

    Returns:
        logprobs [N] and entropy [N] in nats; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit; what a sparse gradient does not support.
    """
    head = Head(weight, bias, temperature, softcap, support, lora)
    _check(hidden, head, targets)
    sparse = check_sparse(grad, sparse, head, len(hidden), may_have_weights=True)
    a, b = (None, None) if lora is None else lora[:2]
    return _LinearLogprobs.apply(hidden, weight, bias, a, b, targets, head, sparse, torch.is_grad_enabled())  # type: ignore


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    columns: Mapping[str, Tensor],
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    support: Tensor | None = None,
    lora: Lora | None = None,
    grad: str = "dense",
    sparse: SparseGradient | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A sum of per-token losses with gradient to `hidden`, in two matmuls where the head is frozen.

    The loss is evaluated inside each chunk; d loss / d hidden is computed there and then, rounded once, and the
    backward pass only scales it. A head that needs gradient goes through `linear_logprobs` in one piece.

    Args:
        hidden, weight, targets, temperature, softcap, bias, support, lora: as in `linear_logprobs`.
        grad, sparse: as in `linear_logprobs`. The gradients that the loss gives to the logprobs are the weights of the
            sparse gradient's rows.
        token_loss: any PyTorch function (logprobs [n], entropy [n], columns of [n]) -> (loss [], metrics of []).
            Both logprobs and entropy carry gradient. It is called once a chunk, never with n = 0; losses and metrics
            of the chunks are summed, metrics whose name ends in `_max` combined by their maximum. It must mask before
            `exp`: a masked row may hold -inf or nan.
        columns: per-token tensors [N, ...], handed to `token_loss` chunk by chunk; they get no gradient.

    Returns:
        The loss [], the metrics of all rows, and the detached logprobs [N].

    Raises:
        ValueError: as `linear_logprobs`; a column whose length is not N.
    """
    head = Head(weight, bias, temperature, softcap, support, lora)
    _check(hidden, head, targets)
    for name, column in columns.items():
        if len(column) != len(hidden):
            raise ValueError(f"column {name!r} has {len(column)} rows, expected {len(hidden)}")
    sparse = check_sparse(grad, sparse, head, len(hidden), may_have_weights=False)
    is_recorded = torch.is_grad_enabled()
    is_head_trained = lora is not None or weight.requires_grad or (bias is not None and bias.requires_grad)
    if is_recorded and is_head_trained and len(hidden):
        logprobs, entropy = linear_logprobs(
            hidden, weight, targets, temperature=temperature, softcap=softcap, bias=bias, support=support, lora=lora
        )
        loss, metrics = token_loss(logprobs, entropy, columns)
        return loss, {name: value.detach() for name, value in metrics.items()}, logprobs.detach()
    loss, logprobs, names, *values = _LinearTokenLoss.apply(  # type: ignore
        hidden, head, targets, token_loss, columns, sparse, is_recorded
    )
    return loss, dict(zip(names, values, strict=True)), logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        targets: Tensor, head: Head, sparse: SparseGradient | None, is_recorded: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_hidden, *needs_head = ctx.needs_input_grad[:5]
        with_direction = is_recorded and needs_hidden and not any(needs_head) and head.lora is None
        logprobs, entropy = _new_results(hidden)
        direction = torch.empty_like(hidden) if with_direction else None  # d logprob / d hidden
        writer = _writer(sparse, direction)
        softmax = _softmax(hidden, head, is_sparse=writer is not None)
        for rows in softmax.chunks:
            logprobs[rows], entropy[rows] = softmax.forward(
                hidden[rows], targets[rows], rows, with_gradient=with_direction and writer is None
            )
            if direction is None:
                continue
            if writer is not None:
                writer.write(softmax, head.rows(rows), targets[rows], rows, direction[rows])
            else:
                softmax.hidden_gradient(torch.ones_like(logprobs[rows]), None, direction[rows])
        if writer is not None:
            writer.finish()
        ctx.is_sparse = sparse is not None
        ctx.head = replace(head, weight=weight.detach(), bias=None, lora=None)
        ctx.scaling = 1.0 if head.lora is None else head.lora.scaling
        ctx.save_for_backward(hidden, weight, bias, a, b, targets, direction)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, a, b, targets, direction = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        if ctx.is_sparse and grad_entropy is not None:
            refuse_entropy_gradient()
        if direction is not None and grad_entropy is None:
            assert grad_logprobs is not None
            return _scale_rows(direction, grad_logprobs), *(None,) * 8
        head = replace(ctx.head, weight=weight, bias=bias, lora=None if a is None else Lora(a, b, ctx.scaling))
        gradients = _gradients(hidden, head, targets, grad_logprobs, grad_entropy, ctx.needs_input_grad[:5])
        return *gradients, *(None,) * 4


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, token_loss: TokenLoss,
        columns: Mapping[str, Tensor], sparse: SparseGradient | None, is_recorded: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        with_gradient = is_recorded and ctx.needs_input_grad[0]
        logprobs, _ = _new_results(hidden)
        loss = logprobs.new_zeros(())
        metrics: dict[str, Tensor] = {}
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        writer = _writer(sparse, grad_hidden)
        softmax = _softmax(hidden, head, is_sparse=writer is not None)
        for rows in softmax.chunks:
            part, entropy = softmax.forward(
                hidden[rows], targets[rows], rows, with_gradient=with_gradient and writer is None
            )
            logprobs[rows] = part
            chunk_columns = {name: column[rows] for name, column in columns.items()}
            value, chunk_metrics, grads = _evaluate(token_loss, part, entropy, chunk_columns, with_gradient)
            loss += value
            _merge(metrics, chunk_metrics)
            if grad_hidden is None:
                continue
            if writer is not None:
                writer.write_scaled(softmax, head.rows(rows), targets[rows], *grads, grad_hidden[rows])
            else:
                softmax.hidden_gradient(*grads, grad_hidden[rows])
        if writer is not None:
            writer.finish()
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(logprobs, *metrics.values())
        return loss, logprobs, tuple(metrics), *metrics.values()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *(None,) * 6


def _evaluate(
    token_loss: TokenLoss, logprobs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], with_gradient: bool
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """The chunk's loss and metrics, detached, and d loss / d (logprobs, entropy), None where the loss has none."""
    leaves = (logprobs.detach().requires_grad_(with_gradient), entropy.detach().requires_grad_(with_gradient))
    with torch.set_grad_enabled(with_gradient):
        loss, metrics = token_loss(*leaves, columns)
    grads: tuple[Tensor | None, ...] = (None, None)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), {name: value.detach() for name, value in metrics.items()}, (grads[0], grads[1])


def _merge(metrics: dict[str, Tensor], chunk: Mapping[str, Tensor]) -> None:
    """Add the chunk's metrics; those named *_max by their maximum."""
    for name, value in chunk.items():
        if name not in metrics:
            metrics[name] = value.clone()
        elif name.endswith("_max"):
            torch.maximum(metrics[name], value, out=metrics[name])
        else:
            metrics[name] += value


def _scale_rows(direction: Tensor, weights: Tensor) -> Tensor:
    """direction [N, D] times weights [N]; exactly 0 where the weight is 0."""
    scaled = direction * weights[:, None]  # in the accumulation dtype
    return scaled.masked_fill_(weights[:, None] == 0, 0.0).to(direction.dtype)


def _softmax(hidden: Tensor, head: Head, *, is_sparse: bool) -> Any:
    if not use_triton(hidden.device):
        return ReferenceSoftmax(hidden, head)
    from rlbench_kernels.linear_logprobs_fused_triton import FusedSoftmax, can_fuse
    from rlbench_kernels.linear_logprobs_sparse_triton import SparseFusedSoftmax
    from rlbench_kernels.linear_logprobs_triton import TritonSoftmax

    if not can_fuse(hidden, head):
        return TritonSoftmax(hidden, head)
    return SparseFusedSoftmax(hidden, head) if is_sparse else FusedSoftmax(hidden, head)


def _writer(sparse: SparseGradient | None, gradient: Tensor | None) -> SparseWriter | None:
    """None where the gradient is dense, or where there is none."""
    return None if sparse is None or gradient is None else SparseWriter(sparse, gradient.device)


def _gradients(hidden: Tensor, head: Head, *args: Any) -> tuple[Tensor | None, ...]:
    if use_triton(hidden.device):
        from rlbench_kernels.linear_logprobs_triton import triton_gradients

        return triton_gradients(hidden, head, *args)
    return reference_gradients(hidden, head, *args)


def _new_results(hidden: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))
    return logprobs, torch.empty_like(logprobs)


def _check(hidden: Tensor, head: Head, targets: Tensor) -> None:
    check_head(hidden, head)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 [{len(hidden)}] expected, got {targets.dtype} {[*targets.shape]}")
