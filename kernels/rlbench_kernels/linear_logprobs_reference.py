"""PyTorch arithmetic of `linear_logprobs`, one chunk of rows at a time: the meaning of the op, and its CPU version.

Shapes: N rows, n rows of one chunk, D hidden, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlbench_kernels.linear_logprobs_head import Gradients, Head, accumulation_dtype

# One float32 buffer of a chunk: 64 MiB. Loss and backward of 4096 rows on 2 busy cores of an AMD EPYC (bf16, D=576,
# V=49152), for 2^22 to 2^26 elements: 5.1, 4.3, 3.7, 4.1, 5.4 s.
_CHUNK_ELEMENTS = 2**24


class ReferenceSoftmax:
    """Softmax over the vocabulary for a chunk of rows; `forward` first, then at most one gradient of that chunk.

    Two buffers [n, V] in the accumulation dtype (float64 for float64 inputs, else float32) and, for 16-bit inputs, one
    in the input dtype live as long as the object: allocating them per chunk is slow on CPU.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        vocabulary = head.weight.shape[0]
        size = max(1, min(len(hidden), _CHUNK_ELEMENTS // vocabulary))
        self.head = head
        self.chunks = [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
        dtype = accumulation_dtype(hidden.dtype)
        self._scores = hidden.new_empty((size, vocabulary), dtype=dtype)
        self._probs = torch.empty_like(self._scores)
        # 16-bit logits, later 16-bit probabilities
        self._narrow = self._scores if hidden.dtype == dtype else hidden.new_empty((size, vocabulary))
        self._slope: Tensor | None = None
        self.lora = None if head.lora is None else head.cast_lora(dtype)

    def forward(self, hidden: Tensor, targets: Tensor, rows: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """logprobs [n] and entropy [n] of the chunk; hidden [n, D], targets int64 [n], rows of the whole."""
        del with_gradient  # the probabilities are there either way
        self._head, self._targets, n = self.head.rows(rows), targets, len(hidden)
        scores, probs = self._scores[:n], self._probs[:n]
        torch.mm(hidden, self._head.weight.T, out=self._narrow[:n])
        if self._narrow is not self._scores:
            scores.copy_(self._narrow[:n])
        if self.lora is not None:
            a, b = self.lora
            scores.addmm_(hidden.to(a.dtype) @ a.T, b.T)
        self._slope = to_scores(scores, self._head)
        target_scores = scores.gather(1, targets[:, None])[:, 0]
        is_outside = _outside(scores, targets, self._head.support)
        if is_outside is not None:
            scores.masked_fill_(is_outside, -torch.inf)
        highest = scores.amax(-1)  # [n]
        torch.softmax(scores, -1, out=probs)
        log_total = highest - probs.amax(-1).log_()  # the largest probability is exp(0) / total
        if is_outside is not None:
            scores.masked_fill_(is_outside, 0.0)
        mean_score = torch.mul(probs, scores, out=scores).sum(-1)
        self._logprobs, self._entropy = target_scores - log_total, log_total - mean_score
        return self._logprobs, self._entropy

    def hidden_gradient(self, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, out: Tensor) -> None:
        """out [n, D] = grad_logprobs dlogprob/dhidden + grad_entropy dentropy/dhidden; 0 where both weights are 0.

        Not with LoRA, which is trained: `reference_gradients`.
        """
        assert self.lora is None
        n = len(out)
        if grad_logprobs is None and grad_entropy is None:
            out.zero_()
            return
        if grad_entropy is not None:
            grad = self._narrow_copy(self.logit_gradient(grad_logprobs, grad_entropy)) @ self._head.weight
            out.copy_(torch.where(_is_active(grad_logprobs, grad_entropy)[:, None], grad, 0.0))
            return
        assert grad_logprobs is not None
        weights = grad_logprobs / self._head.temperature  # [n]
        probs, target_weight = self.other_probs(slice(n))
        mean_row = self._narrow_copy(probs) @ self._head.weight  # [n, D]: sum over v != target of p_v slope_v W_v
        grad = self._head.weight[self._targets].to(target_weight.dtype).mul_(target_weight[:, None]).sub_(mean_row)
        out.copy_(torch.where(weights[:, None] != 0, grad.mul_(weights[:, None]), 0.0))

    def logit_gradient(self, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
        """[n, V], the gradient of hidden W^T + bias; overwrites the chunk's buffers.

        d/ds = g (onehot - p) - g_entropy p (log p + entropy), then the slope of softcap, then 1 / temperature.
        """
        n = len(self._targets)
        probs, grad = self._probs[:n], self._scores[:n]
        g = torch.zeros_like(self._logprobs) if grad_logprobs is None else grad_logprobs
        if grad_entropy is None:
            torch.mul(probs, -g[:, None], out=grad)
        else:
            torch.xlogy(probs, probs, out=grad).mul_(-grad_entropy[:, None])
            grad.sub_(probs.mul_((g + grad_entropy * self._entropy)[:, None]))
        grad.scatter_add_(1, self._targets[:, None], g[:, None])
        if self._slope is not None:
            grad.mul_(self._slope)
        return _divide_rows_(grad, self._head.temperature)

    def other_probs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """p slope [m, V] of rows of the chunk, 0 at the target, and (1 - p) slope [m] of the target.

        Overwrites their probabilities; slope is the softcap's.
        """
        targets, target_weight = self._targets[rows, None], -torch.expm1(self._logprobs[rows])
        probs = self._probs[: len(self._targets)][rows].scatter_(1, targets, 0.0)
        if self._slope is not None:
            target_weight = target_weight * self._slope[rows].gather(1, targets)[:, 0]
            probs.mul_(self._slope[rows])
        return probs, target_weight

    def _narrow_copy(self, values: Tensor) -> Tensor:
        return values if self._narrow is self._scores else self._narrow[: len(values)].copy_(values)


def reference_gradients(
    hidden: Tensor, head: Head, targets: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D], bias [V], A [R, D] and B [V, R] (None unless `wanted`), from logits
    computed again.

    Rows whose weights are 0 give nothing, whatever they hold.
    """
    gradients = Gradients.of(hidden, head, wanted)
    softmax = ReferenceSoftmax(hidden, head)
    for rows in softmax.chunks:
        g, g_entropy = (None if grad is None else grad[rows] for grad in (grad_logprobs, grad_entropy))
        active = _is_active(g, g_entropy)[:, None]  # [n, 1]
        softmax.forward(hidden[rows], targets[rows], rows, with_gradient=True)
        exact = softmax.logit_gradient(g, g_entropy).masked_fill_(~active, 0.0)  # [n, V]
        _add_gradients(gradients.rows(rows), exact, hidden[rows].masked_fill(~active, 0.0), head, softmax.lora)
    return gradients.in_order(head)


def _add_gradients(
    gradients: Gradients, exact: Tensor, hidden: Tensor, head: Head, lora: tuple[Tensor, Tensor] | None
) -> None:
    """From the logit gradients [n, V] of hidden [n, D]; lora: A and scaling B in their dtype."""
    grad_logits = exact.to(hidden.dtype)
    if gradients.bias is not None:
        gradients.bias += exact.sum(0)
    if gradients.weight is not None:
        gradients.weight += grad_logits.T @ hidden
    if lora is None:
        if gradients.hidden is not None:
            torch.mm(grad_logits, head.weight, out=gradients.hidden)
        return
    a, b = lora
    grad_low = exact @ b  # [n, R]
    wide = hidden.to(exact.dtype)
    if gradients.hidden is not None:
        gradients.hidden.copy_(torch.addmm((grad_logits @ head.weight).to(exact.dtype), grad_low, a))
    if gradients.lora_a is not None:
        gradients.lora_a.addmm_(grad_low.T, wide)
    if gradients.lora_b is not None:
        gradients.lora_b.addmm_(exact.T, wide @ a.T)


def to_scores(logits: Tensor, head: Head) -> Tensor | None:
    """In place: logits [n, V] become scores; returns the softcap's slope [n, V], 1 - tanh^2."""
    slope = None
    if head.bias is not None:
        logits += head.bias
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1.0 - logits.square()
        logits *= head.softcap
    _divide_rows_(logits, head.temperature)
    return slope


def _outside(scores: Tensor, targets: Tensor, support: Tensor | None) -> Tensor | None:
    """bool [n, V]: below the support and not the target."""
    if support is None:
        return None
    return (scores < support[:, None]).scatter_(1, targets[:, None], False)


def _divide_rows_(values: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return values.div_(temperature[:, None])
    return values if temperature == 1.0 else values.div_(temperature)


def _is_active(*weights: Tensor | None) -> Tensor:
    """[n]: any of the weights is not 0."""
    present = [weight != 0 for weight in weights if weight is not None]
    return torch.stack(present).any(0)
