"""Logprobs of target tokens and entropy, from logits that are in memory.

Shapes: N rows, V vocabulary, n rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton

_CHUNK_ELEMENTS = 2**24  # of the reference: a float32 buffer of 64 MiB


def logprobs(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """logprobs[i] = log_softmax(logits[i] / T)[targets[i]] and the entropy of softmax(logits[i] / T).

    Both are differentiable to the logits, which are never overwritten. On CUDA they are read once in the forward
    pass, and once in the backward pass. The target stays out of the summed exponentials: logprobs keep their relative
    precision where the target's probability is nearly 1. A row that gets gradient 0 receives gradient 0, whatever it
    holds. Logits of -inf are allowed: their tokens have probability 0.
    From hidden states `linear_logprobs` needs no logits in memory.

    Args:
        logits: [N, V], any floating dtype; on CUDA with any row stride.
        targets: int64 [N], 0 <= target < V; the range is not checked, which would wait for a GPU.
        temperature: > 0; a number or one per row, float32 [N].

    Returns:
        logprobs [N] and entropy [N] in nats; float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit.
    """
    _check(logits, targets, temperature)
    return _Logprobs.apply(logits, targets, temperature)  # type: ignore


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        if _has_kernel(logits):
            from rlbench_kernels.logprobs_triton import launch_logprobs

            results = launch_logprobs(logits, targets, temperature)
        else:
            results = _reference(logits, targets, temperature)
        is_tensor = isinstance(temperature, Tensor)
        ctx.save_for_backward(logits, targets, *results, *([temperature] if is_tensor else []))
        ctx.temperature = None if is_tensor else temperature
        ctx.set_materialize_grads(False)
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None and grad_entropy is None:
            return None, None, None
        logits, targets, values, entropy, log_total, *row_temperatures = ctx.saved_tensors
        grad = torch.zeros_like(values) if grad is None else grad
        temperature = row_temperatures[0] if row_temperatures else ctx.temperature
        if _has_kernel(logits):
            from rlbench_kernels.logprobs_triton import launch_logprob_gradients

            gradients = launch_logprob_gradients
        else:
            gradients = _reference_gradients
        out = gradients(logits, targets, temperature, values, entropy, log_total, grad, grad_entropy)
        return out, None, None


def _reference(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and log of the softmax's denominator, all [N]."""
    values, entropy, log_total = (logits.new_empty(len(logits), dtype=_wide(logits.dtype)) for _ in range(3))
    for rows in _chunks(logits):
        scores, index = _scores(logits, temperature, rows), targets[rows, None]
        target_score = scores.gather(1, index)[:, 0]
        others = scores.scatter(1, index, -torch.inf).logsumexp(-1)
        log_total[rows] = torch.logaddexp(others, target_score)
        values[rows] = -F.softplus(others - target_score)
        probs = scores.sub_(log_total[rows, None]).exp_()
        entropy[rows] = torch.special.entr(probs).sum(-1)
    return values, entropy, log_total


def _reference_gradients(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, values: Tensor, entropy: Tensor, log_total: Tensor,
    grad: Tensor, grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    """d logits [N, V]: (g (onehot - p) - g_entropy p (log p + entropy)) / temperature."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_entropy = torch.zeros_like(grad) if grad_entropy is None else grad_entropy
    for rows in _chunks(logits):
        g, h, index = grad[rows, None], grad_entropy[rows, None], targets[rows, None]
        probs = _scores(logits, temperature, rows).sub_(log_total[rows, None]).exp_()
        value = torch.xlogy(probs, probs).mul_(-h).sub_(probs.mul_(g + h * entropy[rows, None]))
        # the target's own, with 1 - p from its logprob: p near 1 is rounded
        chosen = values[rows, None].exp()
        of_entropy = torch.xlogy(chosen, chosen) + chosen * entropy[rows, None]
        at_target = -g * torch.expm1(values[rows, None]) - h * of_entropy
        value.scatter_(1, index, at_target)
        value /= temperature[rows, None] if isinstance(temperature, Tensor) else temperature
        out[rows] = value.masked_fill_((g == 0) & (h == 0), 0.0)
    return out


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _scores(logits: Tensor, temperature: float | Tensor, rows: slice) -> Tensor:
    """logits / temperature [n, V] in the wide dtype; a new tensor."""
    scores = logits[rows].to(_wide(logits.dtype), copy=True)
    scores /= temperature[rows, None] if isinstance(temperature, Tensor) else temperature
    return scores


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_kernel(logits: Tensor) -> bool:
    return use_triton(logits.device) and logits.dtype != torch.float64 and logits.numel() > 0


def _check(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: floating [N, V] expected, got {logits.dtype} {[*logits.shape]}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 [{len(logits)}] expected, got {targets.dtype} {[*targets.shape]}")
    if isinstance(temperature, Tensor):
        if temperature.shape != logits.shape[:1]:
            raise ValueError(f"temperature: a number or [{len(logits)}] expected, got {[*temperature.shape]}")
    elif temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
