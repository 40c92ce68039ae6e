"""Supervised fine-tuning: one optimizer step, and the loss on held-out rows.

Shapes: N loss positions of one microbatch, n of one chunk of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlbench.data.packing import Microbatch
from rlbench.models.policy import Policy
from rlbench.training.microbatch_budget import MicrobatchBudget, as_before, split_microbatches
from rlbench.training.step import StepResult, add_shares, finish_step
from rlbench_kernels import linear_token_loss


def sft_step(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    budget: MicrobatchBudget | None = None,
) -> StepResult:
    """Make one update with the loss -sum_t logprob_t / (trained tokens of all microbatches).

    Args:
        policy: its adapter is updated.
        microbatches: all data of the step, on the policy's device; `loss_mask` marks the trained tokens.
        optimizer: over `policy.parameters()`, learning rate set.
        max_grad_norm: as in `train_step`.
        budget: as in `train_step`.

    Raises:
        RunMemoryError: not even one row a microbatch fits.
    """
    num_loss_tokens = _num_loss_tokens(microbatches)

    def accumulate(tokens: int | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        packed = microbatches if tokens is None else split_microbatches(microbatches, tokens)
        sums: dict[str, Tensor] = {}
        logprobs: list[Tensor] = []
        for microbatch in packed:
            loss, shares, own = _loss(policy, microbatch, num_loss_tokens)
            loss.backward()
            add_shares(sums, shares | {"loss/total": loss.detach()})
            logprobs.append(own)
        return sums, as_before(logprobs, packed, microbatches)

    rows = [[sample] for microbatch in microbatches for sample in microbatch.samples]
    sums, logprobs = budget.attempt(rows, accumulate) if budget else accumulate(None)
    return finish_step(policy, optimizer, sums, logprobs, max_grad_norm=max_grad_norm)


@torch.no_grad()
def held_out_loss(policy: Policy, microbatches: Sequence[Microbatch]) -> dict[str, float]:
    """`loss/nll` and `policy/entropy` without an update: means over the trained tokens, in nats."""
    sums: dict[str, Tensor] = {}
    num_loss_tokens = _num_loss_tokens(microbatches)
    for microbatch in microbatches:
        add_shares(sums, _loss(policy, microbatch, num_loss_tokens)[1])
    return {name: float(value) for name, value in sums.items()}


def _num_loss_tokens(microbatches: Sequence[Microbatch]) -> int:
    return sum(int(microbatch.loss_mask.sum()) for microbatch in microbatches)


def _loss(policy: Policy, microbatch: Microbatch, num_loss_tokens: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The microbatch's part of the loss and of the metrics, and its logprobs [N]."""

    def token_loss(logprobs: Tensor, entropy: Tensor, part: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        nll = -torch.where(part["loss_mask"], logprobs, 0.0).sum() / num_loss_tokens
        mean_entropy = torch.where(part["loss_mask"], entropy.detach(), 0.0).sum() / num_loss_tokens
        return nll, {"loss/nll": nll.detach(), "policy/entropy": mean_entropy}

    columns = {"loss_mask": microbatch.loss_mask}
    hidden, weight, targets = policy.hidden(microbatch), policy.head_weight, microbatch.targets
    return linear_token_loss(hidden, weight, targets, token_loss, columns, softcap=policy.softcap)
