"""Logprobs of target tokens straight from hidden states, without the [N, V] logits in memory.

Shapes: N rows, D hidden, V vocabulary, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton
from rlbench_kernels.linear_logprobs_reference import (
    Head,
    ReferenceSoftmax,
    accumulation_dtype,
    reference_gradients,
)

TokenLoss = Callable[[Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logprobs[i] = log_softmax(s[i])[targets[i]] and the entropy of softmax(s[i]), s = cap(hidden W^T + bias) / T.

    cap(z) = softcap * tanh(z / softcap). Both results are differentiable to hidden, weight and bias.
    With a frozen head d logprob / d hidden is computed in the forward pass and scaled in the backward pass: two
    matmuls. A gradient through the entropy, or to weight or bias, computes the logits a second time.
    With and without gradient the results have the same bits, and they are those of `linear_token_loss`.
    A row that gets gradient 0 receives gradient 0, whatever it holds: masked rows may be inf or nan.

    Args:
        hidden: [N, D], float32, bfloat16 or float64.
        weight: [V, D], same dtype.
        targets: int64 [N], 0 <= target < V.
        temperature: > 0; a number or one per row, float32 [N].
        softcap: > 0, or None.
        bias: [V], or None.

    Returns:
        logprobs [N] and entropy [N] in nats; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit.
    """
    _check(hidden, weight, targets, temperature, softcap, bias)
    is_recorded = torch.is_grad_enabled()
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, softcap, is_recorded)  # type: ignore


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
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A sum of per-token losses with gradient to `hidden`, in two matmuls where the head is frozen.

    The loss is evaluated inside each chunk; d loss / d hidden is computed there and then, rounded once, and the
    backward pass only scales it. A head that needs gradient goes through `linear_logprobs` in one piece.

    Args:
        hidden, weight, targets, temperature, softcap, bias: as in `linear_logprobs`.
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
    _check(hidden, weight, targets, temperature, softcap, bias)
    for name, column in columns.items():
        if len(column) != len(hidden):
            raise ValueError(f"column {name!r} has {len(column)} rows, expected {len(hidden)}")
    is_recorded = torch.is_grad_enabled()
    if is_recorded and (weight.requires_grad or (bias is not None and bias.requires_grad)) and len(hidden):
        logprobs, entropy = linear_logprobs(
            hidden, weight, targets, temperature=temperature, softcap=softcap, bias=bias
        )
        loss, metrics = token_loss(logprobs, entropy, columns)
        return loss, {name: value.detach() for name, value in metrics.items()}, logprobs.detach()
    head = Head(weight, bias, temperature, softcap)
    loss, logprobs, names, *values = _LinearTokenLoss.apply(hidden, head, targets, token_loss, columns, is_recorded)  # type: ignore
    return loss, dict(zip(names, values, strict=True)), logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float | Tensor, softcap: float | None, is_recorded: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = Head(weight, bias, temperature, softcap)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with_direction = is_recorded and needs_hidden and not (needs_weight or needs_bias)
        logprobs, entropy = _new_results(hidden)
        direction = torch.empty_like(hidden) if with_direction else None  # d logprob / d hidden
        softmax = _softmax(hidden, head)
        for rows in softmax.chunks:
            logprobs[rows], entropy[rows] = softmax.forward(
                hidden[rows], targets[rows], rows, with_gradient=with_direction
            )
            if direction is not None:
                softmax.hidden_gradient(torch.ones_like(logprobs[rows]), None, direction[rows])
        ctx.head = (temperature, softcap)
        ctx.save_for_backward(hidden, weight, bias, targets, direction)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, direction = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        if direction is not None and grad_entropy is None:
            assert grad_logprobs is not None
            return _scale_rows(direction, grad_logprobs), *(None,) * 6
        gradients = _gradients(
            hidden, Head(weight, bias, *ctx.head), targets, grad_logprobs, grad_entropy, ctx.needs_input_grad[:3]
        )
        return *gradients, *(None,) * 4


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, token_loss: TokenLoss,
        columns: Mapping[str, Tensor], is_recorded: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        with_gradient = is_recorded and ctx.needs_input_grad[0]
        logprobs, _ = _new_results(hidden)
        loss = logprobs.new_zeros(())
        metrics: dict[str, Tensor] = {}
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        softmax = _softmax(hidden, head)
        for rows in softmax.chunks:
            part, entropy = softmax.forward(hidden[rows], targets[rows], rows, with_gradient=with_gradient)
            logprobs[rows] = part
            chunk_columns = {name: column[rows] for name, column in columns.items()}
            value, chunk_metrics, grads = _evaluate(token_loss, part, entropy, chunk_columns, with_gradient)
            loss += value
            _merge(metrics, chunk_metrics)
            if grad_hidden is not None:
                softmax.hidden_gradient(*grads, grad_hidden[rows])
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(logprobs, *metrics.values())
        return loss, logprobs, tuple(metrics), *metrics.values()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *(None,) * 5


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


def _softmax(hidden: Tensor, head: Head) -> Any:
    if not use_triton(hidden.device):
        return ReferenceSoftmax(hidden, head)
    from rlbench_kernels.linear_logprobs_fused_triton import FusedSoftmax, can_fuse
    from rlbench_kernels.linear_logprobs_triton import TritonSoftmax

    return FusedSoftmax(hidden, head) if can_fuse(hidden, head.weight) else TritonSoftmax(hidden, head)


def _gradients(hidden: Tensor, head: Head, *args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if use_triton(hidden.device):
        from rlbench_kernels.linear_logprobs_triton import triton_gradients

        return triton_gradients(hidden, head, *args)
    return reference_gradients(hidden, head, *args)


def _new_results(hidden: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))
    return logprobs, torch.empty_like(logprobs)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None,
    bias: Tensor | None,
) -> None:  # fmt: skip
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] expected, got {[*hidden.shape]} and {[*weight.shape]}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight need one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 [{len(hidden)}] expected, got {targets.dtype} {[*targets.shape]}")
    if isinstance(temperature, Tensor):
        if temperature.shape != hidden.shape[:1]:
            raise ValueError(f"temperature: a number or [{len(hidden)}] expected, got {[*temperature.shape]}")
    elif temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: [{len(weight)}] expected, got {[*bias.shape]}")
