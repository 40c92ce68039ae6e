"""One optimizer step on preferences, and the same losses on held-out rows.

Shapes: N loss positions and B completions of one microbatch, P pairs, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import sum_by_sequence
from rlbench.algorithms.preference_losses import mismatch_kl, wpo_log_weights
from rlbench.config.preference import PreferenceConfig
from rlbench.data.packing import Microbatch, num_packed_tokens, pack
from rlbench.data.preferences import PreferenceRow
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training.microbatch_budget import MicrobatchBudget, as_before, split_microbatches
from rlbench.training.preference_objective import Completions, PreferenceObjective
from rlbench.training.step import StepResult, add_shares, finish_step, reference_logprobs
from rlbench_kernels import linear_logprobs

ReferenceTable = Mapping[str, Sequence[float]]  # by row_id: logps of both completions under the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """The completions of one step, packed: those of a prompt after it, in one microbatch where they fit.

    `pairs` counts completions over all microbatches, in their order. A completion may be in several pairs, or in none.
    """

    microbatches: list[Microbatch]
    pairs: Tensor  # int64 [P, 2]: places of chosen and rejected; [0, 2] of unpaired losses
    labels: Mapping[str, bool] = field(default_factory=dict)  # by row_id: is_desirable; of unpaired losses
    mismatched: list[Microbatch] = field(default_factory=list)  # of losses that read their KL

    @property
    def num_rows(self) -> int:
        """Pairs; of unpaired losses completions."""
        return len(self.samples) if self.labels else len(self.pairs)

    @property
    def samples(self) -> list[TrainingSample]:
        return [sample for microbatch in self.microbatches for sample in microbatch.samples]

    @property
    def num_chosen_tokens(self) -> int:
        """Of pairs; a completion counts as often as it is chosen."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        return sum(lengths[place] for place in self.pairs[:, 0].tolist())

    def pairs_by_microbatch(self) -> list[Tensor] | None:
        """The pairs of each, counted from its own first completion; None if a pair lies in two of them."""
        parts, start = [], 0
        for microbatch in self.microbatches:
            own = self.pairs - start
            is_inside = (own >= 0) & (own < microbatch.num_sequences)
            parts.append(own[is_inside.all(dim=1)])
            start += microbatch.num_sequences
        return parts if sum(map(len, parts)) == len(self.pairs) else None

    def split(self, tokens: int) -> PreferenceBatch:
        """The same completions in microbatches of at most `tokens` tokens."""
        microbatches = split_microbatches(self.microbatches, tokens)
        samples = [sample for microbatch in microbatches for sample in microbatch.samples]
        place_of = {id(sample): place for place, sample in enumerate(samples)}
        places = torch.tensor([place_of[id(sample)] for sample in self.samples], device=self.pairs.device)
        longest = max((num_packed_tokens([s]) for mb in self.mismatched for s in mb.samples), default=0)
        mismatched = split_microbatches(self.mismatched, max(tokens, longest))
        return replace(self, microbatches=microbatches, pairs=places[self.pairs], mismatched=mismatched)


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
            for part in without_repeats(rows)
            for microbatch in pack(
                [sample for row in part for sample in row.samples(*wanted)],
                tokens_per_microbatch=tokens_per_microbatch,
                device=device,
            )
        ]

    num_pairs = 0 if config.is_unpaired else len(rows)
    return PreferenceBatch(
        microbatches=packed(*indices),
        pairs=torch.arange(2 * num_pairs, device=device).view(num_pairs, 2),  # next to each other
        labels={row.row_id: bool(row.is_desirable) for row in rows} if config.is_unpaired else {},
        mismatched=packed(1) if config.needs_mismatch else [],
    )


def without_repeats(rows: Sequence[PreferenceRow]) -> list[list[PreferenceRow]]:
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
    ref_logps: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    budget: MicrobatchBudget | None = None,
) -> StepResult:
    """Make one update from a batch.

    A loss that sorts the step's pairs, or pairs that lie in two microbatches, are differentiated with respect to all
    completions' logps first, from a forward without gradient; a second forward carries that gradient on, so that memory
    stays that of one microbatch.

    Args:
        policy: its adapter is updated.
        batch: from `make_batch`.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `preference` part of the config.
        max_grad_norm: as in `train_step`.
        reference: logps computed before, by row; None: a forward, where a loss needs it.
        ref_logps: the same for each microbatch, of `batch_ref_logps`; None: from `reference`.
        temperature: logprobs are taken at it; that of sampling where the policy wrote the completions.
        budget: as in `train_step`.

    Raises:
        RunMemoryError: not even one completion a microbatch fits.
    """
    if ref_logps is None and (reference is not None or not config.needs_reference):
        ref_logps = batch_ref_logps(policy, batch, config, reference)

    def accumulate(tokens: int | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        packed = batch if tokens is None else batch.split(tokens)
        if ref_logps is None:
            own = batch_ref_logps(policy, packed, config, None)
        else:
            own = _moved(ref_logps, batch.microbatches, packed.microbatches)
        sums, logprobs = _gradients(policy, packed, config, reference, own, temperature)
        return sums, as_before(logprobs, packed.microbatches, batch.microbatches)

    sums, logprobs = budget.attempt([[s] for s in batch.samples], accumulate) if budget else accumulate(None)
    return finish_step(policy, optimizer, sums, logprobs, max_grad_norm=max_grad_norm)


def _moved(values: Sequence[Tensor], before: Sequence[Microbatch], packed: Sequence[Microbatch]) -> list[Tensor]:
    """Values [B] of the completions of `before`, for the microbatches `packed` of the same completions."""
    of_sample = {
        id(sample): value
        for microbatch, column in zip(before, values, strict=True)
        for sample, value in zip(microbatch.samples, column, strict=True)
    }
    return [torch.stack([of_sample[id(sample)] for sample in microbatch.samples]) for microbatch in packed]


def _gradients(
    policy: Policy,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    reference: ReferenceTable | None,
    ref_logps: Sequence[Tensor],
    temperature: float,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Accumulate the step's gradient; returns its metrics and the logprobs [N] of each microbatch."""
    objective = _objective(policy, batch, config, reference)
    pairs = None if config.needs_whole_step else batch.pairs_by_microbatch()
    if pairs is None:
        with policy.rehearsal():
            gradients, sums, all_logprobs = _whole_step(policy, batch, config, ref_logps, objective, temperature)
        for microbatch, gradient in zip(batch.microbatches, gradients, strict=True):
            (sequence_logps(policy, microbatch, temperature) * gradient).sum().backward()
        return _finished(sums, objective), all_logprobs
    sums: dict[str, Tensor] = {}
    all_logprobs: list[Tensor] = []
    for microbatch, ref, own in zip(batch.microbatches, ref_logps, pairs, strict=True):
        completions, logprobs = _completions(policy, microbatch, batch, config, ref, own, temperature)
        loss, shares = objective(completions)
        loss.backward()
        add_shares(sums, shares)
        all_logprobs.append(logprobs)
    return _finished(sums, objective), all_logprobs


@torch.no_grad()
def held_out_preferences(
    policy: Policy, batch: PreferenceBatch, config: PreferenceConfig, *, reference: ReferenceTable | None
) -> dict[str, float]:
    """The metrics of a step, without an update."""
    objective = _objective(policy, batch, config, reference)
    ref_logps = batch_ref_logps(policy, batch, config, reference)
    _, sums, _ = _whole_step(policy, batch, config, ref_logps, objective, 1.0)
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
                logps = _reference_logps(policy, microbatch, 1.0) if is_base else sequence_logps(policy, microbatch)
            for sample, value in zip(microbatch.samples, logps.tolist(), strict=True):
                table[sample.group_id].append(value)
    return table


def batch_ref_logps(
    policy: Policy,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    table: ReferenceTable | None,
    *,
    frozen: Policy | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Logps under the reference, of each microbatch: float32 [B], without gradient; 0 where no loss needs them.

    Args:
        table: computed before; None: a forward.
        frozen: the reference; None: the policy's base with the adapter off.
    """
    if not config.needs_reference:
        return [torch.zeros(microbatch.num_sequences, device=policy.device) for microbatch in batch.microbatches]
    if table is not None:
        return [_from_table(policy, microbatch, config, table, 0) for microbatch in batch.microbatches]
    return [_reference_logps(policy, microbatch, temperature, frozen) for microbatch in batch.microbatches]


def sequence_logps(policy: Policy, microbatch: Microbatch, temperature: float = 1.0) -> Tensor:
    """Sum of each completion's logprobs: float32 [B]."""
    hidden = policy.hidden(microbatch)
    logprobs = _token_logprobs(policy, hidden, microbatch, temperature)
    return sum_by_sequence(logprobs, microbatch.sequence_ids, microbatch.num_sequences)


def _token_logprobs(policy: Policy, hidden: Tensor, microbatch: Microbatch, temperature: float) -> Tensor:
    """Of the targets, from the hidden states [N, D] before them: float32 [N]."""
    options = {"temperature": temperature, "softcap": policy.softcap}
    return linear_logprobs(hidden, policy.head_weight, microbatch.targets, **options)[0]


def _reference_logps(
    policy: Policy, microbatch: Microbatch, temperature: float, frozen: Policy | None = None
) -> Tensor:
    logprobs = reference_logprobs(policy, microbatch, temperature, frozen)
    return sum_by_sequence(logprobs, microbatch.sequence_ids, microbatch.num_sequences)


def _from_table(
    policy: Policy, microbatch: Microbatch, config: PreferenceConfig, table: ReferenceTable, index: int
) -> Tensor:
    """Logps of the microbatch's completions as the table says: float32 [B].

    Args:
        index: of the completion in its row, where the microbatch holds one of each; pairs hold 0 and 1 in turn.
    """
    picks = [index if config.is_unpaired else i % 2 for i in range(microbatch.num_sequences)]
    values = [table[sample.group_id][pick] for sample, pick in zip(microbatch.samples, picks, strict=True)]
    return torch.tensor(values, device=policy.device)


def _objective(
    policy: Policy, batch: PreferenceBatch, config: PreferenceConfig, reference: ReferenceTable | None
) -> PreferenceObjective:
    kl = None
    if config.needs_mismatch:
        with torch.no_grad():
            logps = torch.cat([sequence_logps(policy, microbatch) for microbatch in batch.mismatched])
        ref_logps = [
            _reference_logps(policy, microbatch, 1.0)
            if reference is None
            else _from_table(policy, microbatch, config, reference, 1)
            for microbatch in batch.mismatched
        ]
        kl = mismatch_kl(logps, torch.cat(ref_logps))
    return PreferenceObjective(
        config=config,
        num_rows=batch.num_rows,
        num_chosen_tokens=batch.num_chosen_tokens,
        num_desirable=sum(batch.labels[sample.group_id] for sample in batch.samples) if batch.labels else 0,
        kl=kl,
    )


def _completions(
    policy: Policy,
    microbatch: Microbatch,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    ref_logps: Tensor,
    pairs: Tensor,
    temperature: float,
) -> tuple[Completions, Tensor]:
    """What the losses read of a microbatch, and its logprobs [N], detached."""
    hidden = policy.hidden(microbatch)  # [N, D]
    logprobs = _token_logprobs(policy, hidden, microbatch, temperature)  # [N]
    ids, num_sequences = microbatch.sequence_ids, microbatch.num_sequences
    lengths = torch.bincount(ids, minlength=num_sequences)
    log_weights = is_desirable = None
    if config.wpo:
        with torch.no_grad():  # at half the temperature: log p^2 - log sum p^2
            sharp = _token_logprobs(policy, hidden, microbatch, 0.5 * temperature)
            log_weights = sum_by_sequence(wpo_log_weights(logprobs, sharp), ids, num_sequences) / lengths
    if config.is_unpaired:
        labels = [batch.labels[sample.group_id] for sample in microbatch.samples]
        is_desirable = torch.tensor(labels, device=policy.device)
    completions = Completions(
        logps=sum_by_sequence(logprobs, ids, num_sequences),
        ref_logps=ref_logps,
        lengths=lengths,
        pairs=pairs,
        log_weights=log_weights,
        is_desirable=is_desirable,
    )
    return completions, logprobs.detach()


def _whole_step(
    policy: Policy,
    batch: PreferenceBatch,
    config: PreferenceConfig,
    ref_logps: Sequence[Tensor],
    objective: PreferenceObjective,
    temperature: float,
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """d loss / d logps [B] of each microbatch, the step's metrics, and logprobs [N], from forwards without gradient."""
    with torch.no_grad():
        found = [
            _completions(policy, microbatch, batch, config, ref, batch.pairs, temperature)
            for microbatch, ref in zip(batch.microbatches, ref_logps, strict=True)
        ]
    parts = [completions for completions, _ in found]
    logps = torch.cat([part.logps for part in parts]).requires_grad_()
    with torch.enable_grad():
        loss, sums = objective(
            Completions(
                logps=logps,
                ref_logps=torch.cat([part.ref_logps for part in parts]),
                lengths=torch.cat([part.lengths for part in parts]),
                pairs=batch.pairs,
                log_weights=_joined([part.log_weights for part in parts]),
                is_desirable=_joined([part.is_desirable for part in parts]),
            )
        )
    (gradient,) = torch.autograd.grad(loss, logps)
    return list(gradient.split([len(part.logps) for part in parts])), sums, [logprobs for _, logprobs in found]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _finished(sums: Mapping[str, Tensor], objective: PreferenceObjective) -> dict[str, Tensor]:
    own = {} if objective.kl is None else {"kl/mismatch": objective.kl}
    return {**sums, **own, "loss/total": sums["loss/preference"]}
