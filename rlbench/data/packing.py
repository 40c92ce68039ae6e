"""Packing: training samples into microbatches without padding, each group's prompt stored once.

A microbatch is one row of tokens: for each group its prompt, then the completions without their last token (which
predicts nothing). The hidden state of the prompt's last token predicts the first token of all its completions.

Shapes: T packed tokens, N loss positions (all completion tokens), G groups, B completions, P longest prompt,
C longest completion input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlbench.records import TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where prompts and completions lie in the packed row, as index tensors (int64, on the model's device).

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

    def completion_mask(self) -> Tensor:
        """bool [B, C, P + C]: True where completion token c of completion b attends."""
        num_completions, longest = self.completion_rows.shape
        device = self.completion_rows.device
        prompt_slots = torch.arange(self.prompt_rows.shape[1], device=device)
        in_prompt = prompt_slots < self.prompt_lengths[self.group_of_completion, None]  # [B, P]
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()  # [C, C]
        return torch.cat([in_prompt[:, None, :].expand(-1, longest, -1), causal.expand(num_completions, -1, -1)], dim=2)


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

    Args:
        samples: one step's training samples, samples of a group next to each other.
        tokens_per_microbatch: packed tokens per forward; prompt plus one completion must fit.
        device: where the tensors go.

    Raises:
        ValueError: if one sample alone exceeds the budget.
    """
    parts = [part for group in _by_group(samples) for part in _split_group(group, tokens_per_microbatch)]
    return [_build(bin_, device) for bin_ in _distribute(parts, tokens_per_microbatch)]


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
            return [[parts[i] for i in sorted(bin_)] for bin_ in bins if bin_]
        num_bins += 1


def _build(parts: list[list[TrainingSample]], device: str | torch.device) -> Microbatch:
    token_ids: list[int] = []
    position_ids: list[int] = []
    prompt_spans: list[tuple[int, int]] = []
    completion_spans: list[tuple[int, int]] = []
    group_of_completion: list[int] = []
    predict_rows: list[int] = []
    for group_index, part in enumerate(parts):
        prompt = part[0].prompt_token_ids
        prompt_spans.append((len(token_ids), len(prompt)))
        token_ids += prompt
        position_ids += range(len(prompt))
        last_prompt_row = len(token_ids) - 1
        for sample in part:
            start, length = len(token_ids), len(sample.token_ids) - 1
            completion_spans.append((start, length))
            group_of_completion.append(group_index)
            predict_rows += [last_prompt_row, *range(start, start + length)]
            token_ids += sample.token_ids[:-1]
            position_ids += range(len(prompt), len(prompt) + length)
    samples = [sample for part in parts for sample in part]

    def int64(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def flat(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for s in samples for x in getattr(s, name)], dtype=dtype, device=device)

    targets = flat("token_ids", torch.int64)
    return Microbatch(
        token_ids=int64(token_ids),
        position_ids=int64(position_ids),
        layout=_layout(prompt_spans, completion_spans, group_of_completion, len(token_ids), device),
        predict_rows=int64(predict_rows),
        targets=targets,
        advantages=flat("advantages", torch.float32),
        sampling_logprobs=flat("sampling_logprobs", torch.float32),
        engine_logprobs=flat("engine_logprobs", torch.float32),
        values=flat("values", torch.float32),
        returns=flat("returns", torch.float32),
        positions=int64([position for sample in samples for position in range(len(sample.token_ids))]),
        loss_mask=flat("loss_mask", torch.bool),
        sequence_ids=int64([index for index, sample in enumerate(samples) for _ in sample.token_ids]),
        num_sequences=len(samples),
        samples=tuple(samples),
        num_prompt_tokens=sum(length for _, length in prompt_spans),
        num_completion_tokens=len(targets),
    )


def _layout(
    prompt_spans: list[tuple[int, int]],
    completion_spans: list[tuple[int, int]],
    group_of_completion: list[int],
    num_tokens: int,
    device: str | torch.device,
) -> PackedLayout:
    prompt_rows, prompt_lengths = _padded_rows(prompt_spans)
    completion_rows, completion_lengths = _padded_rows(completion_spans)
    unpad_index = torch.empty(num_tokens, dtype=torch.int64)
    for offset, rows, lengths in (
        (0, prompt_rows, prompt_lengths),
        (prompt_rows.numel(), completion_rows, completion_lengths),
    ):
        is_real = torch.arange(rows.shape[1]) < lengths[:, None]  # [rows, longest]
        unpad_index[rows[is_real]] = offset + is_real.flatten().nonzero().flatten()
    return PackedLayout(
        prompt_rows=prompt_rows.to(device),
        prompt_lengths=prompt_lengths.to(device),
        completion_rows=completion_rows.to(device),
        completion_lengths=completion_lengths.to(device),
        group_of_completion=torch.tensor(group_of_completion, dtype=torch.int64, device=device),
        unpad_index=unpad_index.to(device),
    )


def _padded_rows(spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows [num_spans, longest] of each span, padded with 0, and lengths [num_spans]."""
    starts, lengths = (torch.tensor(column, dtype=torch.int64) for column in zip(*spans, strict=True))
    slots = torch.arange(max(int(lengths.max()), 1))
    rows = starts[:, None] + slots
    return torch.where(slots < lengths[:, None], rows, 0), lengths
