"""One optimizer step on preferences, and the same losses on held-out rows.

Shapes: N loss positions and B completions of one microbatch, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import sum_by_sequence
from rlbench.algorithms.preference_losses import mismatch_kl, wpo_log_weights
from rlbench.config.preference import PreferenceConfig
from rlbench.data.packing import Microbatch, pack
from rlbench.data.preferences import PreferenceRow
from rlbench.models.policy import Policy
from rlbench.training.preference_objective import Completions, PreferenceObjective
from rlbench.training.step import StepResult, add_shares, finish_step
from rlbench_kernels import linear_logprobs

ReferenceTable = Mapping[str, Sequence[float]]  # by row_id: logps of both completions under the reference
_SHARP = 0.5  # temperature whose logprobs give sum p^2


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """The rows of one step, packed: of a pair both completions after their prompt, in one microbatch."""

    rows: tuple[PreferenceRow, ...]
    microbatches: list[Microbatch]
    mismatched: list[Microbatch]  # of losses that read their KL


def make_batch(
    rows: Sequence[PreferenceRow], config: PreferenceConfig, *, tokens_per_microbatch: int, device: torch.device
) -> PreferenceBatch:
    """
    Raises:
        ValueError: a row exceeds `tokens_per_microbatch`.
    """
    indices = (0,) if config.is_unpaired else (0, 1)

    def packed(*wanted: int) -> list[Microbatch]:
        return [
            microbatch
            for part in _without_repeats(rows)
            for microbatch in pack(
                [sample for row in part for sample in row.samples(*wanted)],
                tokens_per_microbatch=tokens_per_microbatch,
                device=device,
            )
        ]

    return PreferenceBatch(
        rows=tuple(rows),
        microbatches=packed(*indices),
        mismatched=packed(1) if config.needs_mismatch else [],
    )


def _without_repeats(rows: Sequence[PreferenceRow]) -> list[list[PreferenceRow]]:
    """A row that a step holds twice, at an epoch's end, comes in parts of its own: as one group it could be cut."""
    parts: list[dict[str, PreferenceRow]] = []
    for row in rows:
        part = next((part for part in parts if row.row_id not in part), None)
        if part is None:
            parts.append(part := {})
        part[row.row_id] = row
    return [list(part.values()) for part in parts]


def preference_step(
    policy: Policy,
    batch: PreferenceBatch,
    optimizer: torch.optim.Optimizer,
    config: PreferenceConfig,
    *,
    max_grad_norm: float,
    reference: ReferenceTable | None,
) -> StepResult:
    """Make one update from a batch.

    A loss that sorts the step's pairs is differentiated with respect to all completions' logps first, from a forward
    without gradient; a second forward carries that gradient on, so that memory stays that of one microbatch.

    Args:
        policy: its adapter is updated.
        batch: from `make_batch`.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `preference` part of the config.
        max_grad_norm: as in `train_step`.
        reference: logps computed before; None: the adapter is switched off for a forward, where a loss needs it.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    objective = _objective(policy, batch, config, reference)
    if config.needs_whole_step:
        gradients, sums = _whole_step(policy, batch, config, reference, objective)
        for microbatch, gradient in zip(batch.microbatches, gradients, strict=True):
            (sequence_logps(policy, microbatch) * gradient).sum().backward()
    else:
        for microbatch in batch.microbatches:
            loss, shares = objective(_completions(policy, microbatch, batch, config, reference))
            loss.backward()
            add_shares(sums, shares)
    return finish_step(policy, optimizer, _finished(sums, objective), [], max_grad_norm=max_grad_norm)


@torch.no_grad()
def held_out_preferences(
    policy: Policy, batch: PreferenceBatch, config: PreferenceConfig, *, reference: ReferenceTable | None
) -> dict[str, float]:
    """The metrics of a step, without an update."""
    objective = _objective(policy, batch, config, reference)
    if config.needs_whole_step:
        _, sums = _whole_step(policy, batch, config, reference, objective)
    else:
        sums: dict[str, Tensor] = {}
        for microbatch in batch.microbatches:
            add_shares(sums, objective(_completions(policy, microbatch, batch, config, reference))[1])
    return {name: float(value) for name, value in _finished(sums, objective).items()}


def reference_table(
    policy: Policy, rows: Sequence[PreferenceRow], *, is_base: bool, tokens_per_microbatch: int
) -> dict[str, list[float]]:
    """Logps of both completions of every row, by row_id.

    Args:
        policy: the reference, with its adapter on.
        rows: of all data that will be seen.
        is_base: switch the adapter off.
        tokens_per_microbatch: packed tokens of one forward.
    """
    table: dict[str, list[float]] = {row.row_id: [] for row in rows}
    for index in (0, 1):
        samples = [sample for row in rows for sample in row.samples(index)]
        for microbatch in pack(samples, tokens_per_microbatch=tokens_per_microbatch, device=policy.device):
            with torch.no_grad():
                logps = _base_logps(policy, microbatch) if is_base else sequence_logps(policy, microbatch)
            for sample, value in zip(microbatch.samples, logps.tolist(), strict=True):
                table[sample.group_id].append(value)
    return table


def sequence_logps(policy: Policy, microbatch: Microbatch) -> Tensor:
    """Sum of each completion's logprobs: float32 [B]."""
    logprobs, _ = linear_logprobs(policy.hidden(microbatch), policy.head_weight, microbatch.targets)
    return sum_by_sequence(logprobs, microbatch.sequence_ids, microbatch.num_sequences)


def _base_logps(policy: Policy, microbatch: Microbatch) -> Tensor:
    with policy.reference():
        return sequence_logps(policy, microbatch)


def _objective(
    policy: Policy, batch: PreferenceBatch, config: PreferenceConfig, reference: ReferenceTable | None
) -> PreferenceObjective:
    kl = None
    if config.needs_mismatch:
        with torch.no_grad():
            logps = torch.cat([sequence_logps(policy, microbatch) for microbatch in batch.mismatched])
        ref_logps = torch.cat([_reference(policy, mb, config, reference, 1) for mb in batch.mismatched])
        kl = mismatch_kl(logps, ref_logps)
    return PreferenceObjective(
        config=config,
        num_rows=len(batch.rows),
        num_chosen_tokens=sum(len(row.completions[0]) for row in batch.rows),
        num_desirable=sum(bool(row.is_desirable) for row in batch.rows),
        kl=kl,
    )


def _completions(
    policy: Policy,
    microbatch: Microbatch,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    reference: ReferenceTable | None,
) -> Completions:
    hidden = policy.hidden(microbatch)  # [N, D]
    logprobs, _ = linear_logprobs(hidden, policy.head_weight, microbatch.targets)  # [N]
    ids, num_sequences = microbatch.sequence_ids, microbatch.num_sequences
    lengths = torch.bincount(ids, minlength=num_sequences)
    log_weights = is_desirable = None
    if config.wpo:
        with torch.no_grad():
            sharp, _ = linear_logprobs(hidden, policy.head_weight, microbatch.targets, temperature=_SHARP)
            log_weights = sum_by_sequence(wpo_log_weights(logprobs, sharp), ids, num_sequences) / lengths
    if config.is_unpaired:
        labels = {row.row_id: bool(row.is_desirable) for row in batch.rows}
        is_desirable = torch.tensor([labels[s.group_id] for s in microbatch.samples], device=policy.device)
    return Completions(
        logps=sum_by_sequence(logprobs, ids, num_sequences),
        ref_logps=_reference(policy, microbatch, config, reference, 0),
        lengths=lengths,
        log_weights=log_weights,
        is_desirable=is_desirable,
    )


def _reference(
    policy: Policy, microbatch: Microbatch, config: PreferenceConfig, table: ReferenceTable | None, index: int
) -> Tensor:
    """Logps of the microbatch's completions under the reference: float32 [B].

    Args:
        index: of the completion in its row, where the microbatch holds one of each; pairs hold 0 and 1 in turn.
    """
    if not config.needs_reference:
        return torch.zeros(microbatch.num_sequences, device=policy.device)
    if table is None:
        return _base_logps(policy, microbatch)
    picks = [index if config.is_unpaired else i % 2 for i in range(microbatch.num_sequences)]
    values = [table[sample.group_id][pick] for sample, pick in zip(microbatch.samples, picks, strict=True)]
    return torch.tensor(values, device=policy.device)


def _whole_step(
    policy: Policy,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    reference: ReferenceTable | None,
    objective: PreferenceObjective,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """d loss / d logps [B] of each microbatch, and the step's metrics, from forwards without gradient."""
    with torch.no_grad():
        parts = [_completions(policy, microbatch, batch, config, reference) for microbatch in batch.microbatches]
    logps = torch.cat([part.logps for part in parts]).requires_grad_()
    has_weights = parts[0].log_weights is not None
    with torch.enable_grad():
        loss, sums = objective(
            Completions(
                logps=logps,
                ref_logps=torch.cat([part.ref_logps for part in parts]),
                lengths=torch.cat([part.lengths for part in parts]),
                log_weights=torch.cat([p.log_weights for p in parts if p.log_weights is not None])
                if has_weights
                else None,
            )
        )
    (gradient,) = torch.autograd.grad(loss, logps)
    return list(gradient.split([len(part.logps) for part in parts])), sums


def _finished(sums: Mapping[str, Tensor], objective: PreferenceObjective) -> dict[str, Tensor]:
    own = {} if objective.kl is None else {"kl/mismatch": objective.kl}
    return {**sums, **own, "loss/total": sums["loss/preference"]}
