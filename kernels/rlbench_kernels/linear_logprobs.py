"""Logprobs of target tokens straight from hidden states, without the [N, V] logits in memory.

Shapes: N rows, D hidden, V vocabulary, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TokenLoss = Callable[[Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

_CHUNK_ELEMENTS = 2**25  # float32 logits of one chunk: 128 MiB


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """logprobs[i] = log_softmax(hidden[i] W^T / temperature)[targets[i]] and the entropy of that softmax. No gradient.

    The arithmetic is that of `linear_token_loss`, so both give the same bits.

    Args:
        hidden: [N, D], float32 or bfloat16.
        weight: [V, D], same dtype.
        targets: int64 [N].
        temperature: > 0.

    Returns:
        logprobs float32 [N] and entropy float32 [N], nats.
    """
    logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(logprobs)
    with torch.no_grad():
        for rows in _chunks(len(hidden), weight.shape[0]):
            logprobs[rows], entropy[rows], _ = _softmax_chunk(hidden[rows], weight, targets[rows], temperature)
    return logprobs, entropy


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    columns: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A sum of per-token losses with gradient to `hidden`, in two matmuls: the weight is frozen.

    The loss is evaluated inside each chunk while its logits are alive; d loss / d hidden is computed there and then,
    and the backward pass only scales it.

    Args:
        hidden: [N, D], float32 or bfloat16; gets the gradient.
        weight: [V, D], same dtype, frozen.
        targets: int64 [N].
        token_loss: any PyTorch function (logprobs [n], entropy [n], columns of [n]) -> (loss [], metrics of []).
            Both logprobs and entropy carry gradient. Losses and metrics of the chunks are summed.
        columns: per-token tensors [N], handed to `token_loss` chunk by chunk.
        temperature: > 0.

    Returns:
        The loss [], the summed metrics, and the detached logprobs float32 [N].
    """
    return_values = _LinearTokenLoss.apply(hidden, weight, targets, token_loss, columns, temperature)
    loss, logprobs, names, *sums = return_values  # type: ignore[misc]
    return loss, dict(zip(names, sums, strict=True)), logprobs


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_loss: TokenLoss,
                columns: Mapping[str, Tensor], temperature: float) -> tuple[Any, ...]:  # fmt: skip
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        metrics: dict[str, Tensor] = {}
        grad_hidden = torch.empty_like(hidden)
        for rows in _chunks(len(hidden), weight.shape[0]):
            chunk, entropy, probs = _softmax_chunk(hidden[rows], weight, targets[rows], temperature)
            logprobs[rows] = chunk
            leaf, entropy_leaf = chunk.clone().requires_grad_(), entropy.requires_grad_()
            with torch.enable_grad():
                chunk_loss, chunk_metrics = token_loss(leaf, entropy_leaf, {k: v[rows] for k, v in columns.items()})
            grads = torch.autograd.grad(chunk_loss, (leaf, entropy_leaf), allow_unused=True)
            loss += chunk_loss.detach()
            for name, value in chunk_metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach()  # type: ignore[operator]
            _to_logit_gradient(probs, targets[rows], entropy.detach(), *grads)
            torch.mm(probs.div_(temperature).to(weight.dtype), weight, out=grad_hidden[rows])
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(logprobs, *metrics.values())
        return loss, logprobs, tuple(metrics), *metrics.values()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), None, None, None, None, None


def _softmax_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [n], entropy [n] and probabilities [n, V], all float32."""
    scores = (hidden @ weight.T).float()  # [n, V]
    if temperature != 1.0:
        scores /= temperature
    target_scores = scores.gather(1, targets[:, None])[:, 0]
    log_total = torch.logsumexp(scores, dim=-1)  # [n]
    probs = torch.softmax(scores, dim=-1)
    mean_score = torch.linalg.vecdot(probs, scores)
    return target_scores - log_total, log_total - mean_score, probs


def _to_logit_gradient(
    probs: Tensor, targets: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    """In place: probs [n, V] become d loss / d scaled logits = g (onehot - p) - g_entropy p (log p + entropy)."""
    if grad_entropy is not None:
        raise NotImplementedError("entropy gradient")
    if grad_logprobs is None:
        probs.zero_()
        return
    probs *= -grad_logprobs[:, None]
    probs.scatter_add_(1, targets[:, None], grad_logprobs[:, None])


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
