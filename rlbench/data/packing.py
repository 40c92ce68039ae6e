"""Packing: training samples into microbatches without padding, each group's prompt stored once.

A microbatch is one row of tokens: for each group its prompt, then the completions without their last token (which
predicts nothing). The hidden state of the prompt's last token predicts the first token of all its completions.

Shapes: T packed tokens, N loss positions (all completion tokens), G groups, B completions, P longest prompt,
C longest completion input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlbench.records import TrainingSample


Span = tuple[int, int]  # first packed row, number of rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where prompts and completions lie in the packed row. Held on the host: no device is asked for lengths."""

    prompts: tuple[Span, ...]  # of each group
    completions: tuple[Span, ...]  # inputs of each completion; may be empty
    group_of_completion: tuple[int, ...]
    device: torch.device  # the model's

    @property
    def lengths(self) -> list[tuple[int, list[int]]]:
        """Of each group: tokens of the prompt, and of each completion's input."""
        groups: list[tuple[int, list[int]]] = [(length, []) for _, length in self.prompts]
        for group, (_, length) in zip(self.group_of_completion, self.completions, strict=True):
            groups[group][1].append(length)
        return groups

    def padded(self) -> PaddedLayout:
        """The same as index tensors, for attention over padded batches."""
        prompt_rows, prompt_lengths = _padded_rows(self.prompts)
        completion_rows, completion_lengths = _padded_rows(self.completions)
        first = prompt_rows.numel()
        slots = [(start, i * prompt_rows.shape[1], length) for i, (start, length) in enumerate(self.prompts)]
        slots += [
            (start, first + i * completion_rows.shape[1], length) for i, (start, length) in enumerate(self.completions)
        ]
        return PaddedLayout(
            prompt_rows=prompt_rows.to(self.device),
            prompt_lengths=prompt_lengths.to(self.device),
            completion_rows=completion_rows.to(self.device),
            completion_lengths=completion_lengths.to(self.device),
            group_of_completion=torch.tensor(self.group_of_completion, dtype=torch.int64, device=self.device),
            unpad_index=_ranges((slot, length) for _, slot, length in sorted(slots)).to(self.device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedLayout:
    """Index tensors of a `PackedLayout`, int64.

    Padding entries of the row indices are 0: attention masks them out, `unpad_index` never reads them.
    """

    prompt_rows: Tensor  # [G, P] packed row of each prompt token
    prompt_lengths: Tensor  # [G]
    completion_rows: Tensor  # [B, C] packed row of each completion input token
    completion_lengths: Tensor  # [B] input tokens of each completion; may be 0
    group_of_completion: Tensor  # [B]
    unpad_index: Tensor  # [T] row of [G * P + B * C] that belongs to each packed token

    @property
    def key_rows(self) -> Tensor:
        """[B, P + C]: packed rows that a completion may attend to, its group's prompt first."""
        return torch.cat([self.prompt_rows[self.group_of_completion], self.completion_rows], dim=1)

    def completion_mask(self, window: int | None = None) -> Tensor:
        """bool [B, C, P + C]: True where completion token c of completion b attends.

        Args:
            window: to itself and the window - 1 positions before it; None: to all before it.
        """
        num_completions, longest = self.completion_rows.shape
        device = self.completion_rows.device
        prompt_slots = torch.arange(self.prompt_rows.shape[1], device=device)
        in_prompt = prompt_slots < self.prompt_lengths[self.group_of_completion, None]  # [B, P]
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()  # [C, C]
        is_seen = torch.cat([in_prompt[:, None].expand(-1, longest, -1), causal.expand(num_completions, -1, -1)], dim=2)
        if window is None:
            return is_seen
        slots = torch.arange(longest, device=device)
        prompt_ends = self.prompt_lengths[self.group_of_completion, None]  # [B, 1]
        key_positions = torch.cat([prompt_slots.expand(num_completions, -1), prompt_ends + slots], dim=1)  # [B, P + C]
        distance = (prompt_ends + slots)[:, :, None] - key_positions[:, None, :]
        return is_seen & (distance < window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Data of one forward: packed tokens and, per loss position, what the loss reads."""

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T]
    layout: PackedLayout
    predict_rows: Tensor  # int64 [N], packed row whose hidden state predicts the target
    targets: Tensor  # int64 [N]
    advantages: Tensor  # float32 [N]
    sampling_logprobs: Tensor  # float32 [N]
    engine_logprobs: Tensor  # float32 [N], the same without truncation and penalties: the trainer's counterpart
    values: Tensor  # float32 [N], of a critic before its update; empty if there is none
    returns: Tensor  # float32, what the critic learns, as `values`
    positions: Tensor  # int64 [N], place of the target in its completion, from 0
    loss_mask: Tensor  # bool [N]
    sequence_ids: Tensor  # int64 [N], the completion of each position, from 0 to num_sequences - 1
    num_sequences: int  # whole completions: none is cut between microbatches
    samples: tuple[TrainingSample, ...]  # in the order of sequence_ids
    num_prompt_tokens: int
    num_completion_tokens: int


def pack(
    samples: Sequence[TrainingSample], *, tokens_per_microbatch: int, device: str | torch.device
) -> list[Microbatch]:
    """Pack samples into microbatches of at most `tokens_per_microbatch` tokens.

    Groups are kept whole where they fit; a larger group is cut between completions, and each part carries the prompt.
    Parts are spread over the fewest microbatches, largest first, always onto the lightest, so that costs are balanced.
    The microbatch with most tokens comes first: a GPU's allocator can give its blocks to those that follow.

    Args:
        samples: one step's training samples, samples of a group next to each other.
        tokens_per_microbatch: packed tokens per forward; prompt plus one completion must fit.
        device: where the tensors go.

    Raises:
        ValueError: if one sample alone exceeds the budget.
    """
    parts = [part for group in _by_group(samples) for part in _split_group(group, tokens_per_microbatch)]
    return [_build(bin_, device) for bin_ in _distribute(parts, tokens_per_microbatch)]


def with_next_token(sample: TrainingSample) -> TrainingSample:
    """One token more, so that the last real token becomes an input; which one it is does not matter."""
    return replace(
        sample,
        token_ids=(*sample.token_ids, 0),
        sampling_logprobs=(*sample.sampling_logprobs, 0.0),
        advantages=(*sample.advantages, 0.0),
        loss_mask=(*sample.loss_mask, False),
    )


def num_packed_tokens(part: Sequence[TrainingSample]) -> int:
    """Packed length of samples that share one prompt."""
    return len(part[0].prompt_token_ids) + sum(len(s.token_ids) - 1 for s in part)


def _by_group(samples: Sequence[TrainingSample]) -> list[list[TrainingSample]]:
    groups: dict[str, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    return list(groups.values())


def _split_group(group: list[TrainingSample], budget: int) -> list[list[TrainingSample]]:
    parts: list[list[TrainingSample]] = [[]]
    for sample in group:
        if num_packed_tokens([sample]) > budget:
            raise ValueError(
                f"training.tokens_per_microbatch is {budget}, but a sample of group {sample.group_id} has "
                f"{num_packed_tokens([sample])} tokens (prompt {len(sample.prompt_token_ids)}, completion "
                f"{len(sample.token_ids)}); expected a budget of at least the longest prompt plus sampling.max_tokens"
            )
        if parts[-1] and num_packed_tokens([*parts[-1], sample]) > budget:
            parts.append([])
        parts[-1].append(sample)
    return parts


def _distribute(parts: list[list[TrainingSample]], budget: int) -> list[list[list[TrainingSample]]]:
    """Largest first onto the lightest of the fewest bins that hold everything; order inside a bin is stable."""
    order = sorted(range(len(parts)), key=lambda i: (-num_packed_tokens(parts[i]), i))
    num_bins = max(1, -(-sum(num_packed_tokens(p) for p in parts) // budget))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        loads = [0] * num_bins
        for i in order:
            lightest = loads.index(min(loads))
            bins[lightest].append(i)
            loads[lightest] += num_packed_tokens(parts[i])
        if max(loads) <= budget:
            largest_first = sorted(zip(loads, bins, strict=True), key=lambda pair: -pair[0])
            return [[parts[i] for i in sorted(bin_)] for _, bin_ in largest_first if bin_]
        num_bins += 1


def _build(parts: list[list[TrainingSample]], device: str | torch.device) -> Microbatch:
    token_ids: list[int] = []
    prompts: list[Span] = []
    completions: list[Span] = []
    positions: list[Span] = []  # first position, number: of each prompt and completion input
    group_of_completion: list[int] = []
    predicting: list[Span] = []
    for group_index, part in enumerate(parts):
        prompt = part[0].prompt_token_ids
        prompts.append((len(token_ids), len(prompt)))
        positions.append((0, len(prompt)))
        token_ids += prompt
        last_prompt_row = len(token_ids) - 1
        for sample in part:
            start, length = len(token_ids), len(sample.token_ids) - 1
            completions.append((start, length))
            positions.append((len(prompt), length))
            group_of_completion.append(group_index)
            predicting += [(last_prompt_row, 1), (start, length)]
            token_ids += sample.token_ids[:-1]
    samples = [sample for part in parts for sample in part]
    counts = torch.tensor([len(sample.token_ids) for sample in samples])

    def flat(name: str, dtype: type[np.generic]) -> Tensor:
        values = chain.from_iterable(getattr(sample, name) for sample in samples)
        return torch.from_numpy(np.fromiter(values, dtype)).to(device)

    targets = flat("token_ids", np.int64)
    return Microbatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
        position_ids=_ranges(positions).to(device),
        layout=PackedLayout(
            prompts=tuple(prompts),
            completions=tuple(completions),
            group_of_completion=tuple(group_of_completion),
            device=torch.device(device),
        ),
        predict_rows=_ranges(predicting).to(device),
        targets=targets,
        advantages=flat("advantages", np.float32),
        sampling_logprobs=flat("sampling_logprobs", np.float32),
        engine_logprobs=flat("engine_logprobs", np.float32),
        values=flat("values", np.float32),
        returns=flat("returns", np.float32),
        positions=_ranges((0, len(sample.token_ids)) for sample in samples).to(device),
        loss_mask=flat("loss_mask", np.bool_),
        sequence_ids=torch.repeat_interleave(torch.arange(len(samples)), counts).to(device),
        num_sequences=len(samples),
        samples=tuple(samples),
        num_prompt_tokens=sum(length for _, length in prompts),
        num_completion_tokens=len(targets),
    )


def _ranges(spans: Iterable[Span]) -> Tensor:
    """start, start + 1, .. of each span, one behind the other."""
    return torch.cat([torch.arange(start, start + length) for start, length in spans])


def _padded_rows(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Rows [num_spans, longest] of each span, padded with 0, and lengths [num_spans]."""
    starts, lengths = (torch.tensor(column, dtype=torch.int64) for column in zip(*spans, strict=True))
    slots = torch.arange(max(int(lengths.max()), 1))
    rows = starts[:, None] + slots
    return torch.where(slots < lengths[:, None], rows, 0), lengths
