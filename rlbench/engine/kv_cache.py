"""Preallocated key-value memory of the HF engine, and the attention contexts that write and read it.

The prompt of a group is stored once; every row adds its own tokens. A decoding row attends to two pieces, its group's
prompt and its own tokens, with one softmax over both.

Shapes: B rows alive, G distinct prompts, P longest prompt, S own slots, H query heads, K key-value heads, d head
dimension, R most rows of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.models.attention import Scoring, causal_window, heads_as_rows
from rlbench_kernels.masked_attention import additive, cap_scores, masked_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class PromptCache:
    """Keys and values of distinct prompts, [layers, G, K, P, d], filled by one packed forward over all of them."""

    def __init__(self, shape: CacheShape, lengths: list[int]) -> None:
        size = (shape.num_layers, len(lengths), shape.num_kv_heads, max(lengths), shape.head_dim)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.tensor(lengths, device=shape.device)  # [G]
        slots = torch.arange(max(lengths), device=shape.device)
        self.is_token = slots < self.lengths[:, None]  # [G, P]

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Prefill: [1, H, T, d], [1, K, T, d] x 2 -> [1, T, H, d], T the prompts' tokens one after the other."""
        query, key, value = (self._pad(x[0].transpose(0, 1)) for x in (query, key, value))  # [G, H or K, P, d]
        self.keys[layer_index] = key
        self.values[layer_index] = value
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        longest = query.shape[2]
        window, mask = scoring.within(longest).window, None
        if window is not None:
            mask = additive(causal_window(longest, window, query.device), query.dtype)
        output = masked_attention(query, key, value, mask, scale=scoring.scaling, softcap=scoring.softcap)
        return output.transpose(1, 2)[self.is_token].unsqueeze(0)

    def _pad(self, packed: Tensor) -> Tensor:
        """[T, H, d] -> [G, H, P, d], zeros behind the shorter prompts."""
        padded = packed.new_zeros(*self.is_token.shape, *packed.shape[1:])
        padded[self.is_token] = packed
        return padded.transpose(1, 2)


class DecodeCache:
    """Own tokens of all rows, [layers, B, K, S, d], beside a `PromptCache`; one token a row and forward."""

    def __init__(self, shape: CacheShape, prompts: PromptCache, group_of_row: Tensor, num_slots: int) -> None:
        size = (shape.num_layers, len(group_of_row), shape.num_kv_heads, num_slots, shape.head_dim)
        self._keys = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._values = torch.zeros_like(self._keys)
        self._prompts = prompts
        self._num_filled = 0
        self._group_of_row = group_of_row
        self._index_rows()

    def advance(self) -> None:
        """Open the next slot; call once before each forward."""
        self._num_filled += 1

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64, ascending) and move them together."""
        for cache in (self._keys, self._values):
            cache[:, : len(rows), :, : self._num_filled] = cache[:, rows, :, : self._num_filled]
        self._keys = self._keys[:, : len(rows)]
        self._values = self._values[:, : len(rows)]
        self._group_of_row = self._group_of_row[rows]
        self._index_rows()

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Decode: [B, H, 1, d], [B, K, 1, d] x 2 -> [B, 1, H, d]."""
        filled = self._num_filled
        self._keys[layer_index, :, :, filled - 1] = key[:, :, 0]
        self._values[layer_index, :, :, filled - 1] = value[:, :, 0]
        first = 0 if scoring.window is None else max(0, filled - scoring.window)
        own_keys = self._keys[layer_index, :, :, first:filled]  # [B, K, S, d]
        own_values = self._values[layer_index, :, :, first:filled]
        rows = heads_as_rows(query * scoring.scaling, key.shape[1])  # [B, K, H/K, d]

        prompt_keys, prompt_values = self._prompts.keys[layer_index], self._prompts.values[layer_index]
        by_prompt = self._gather_rows(rows)  # [G, K, R * H/K, d]
        prompt_scores = cap_scores(by_prompt @ prompt_keys.transpose(-1, -2), scoring.softcap)  # [G, K, R * H/K, P]
        prompt_scores = prompt_scores + self._mask_of_prompts(scoring.window)
        own_scores = cap_scores(rows @ own_keys.transpose(-1, -2), scoring.softcap)  # [B, K, H/K, S]

        num_prompt_slots = prompt_keys.shape[2]
        scores = torch.cat([self._scatter_rows(prompt_scores), own_scores], dim=-1)
        probs = scores.float().softmax(dim=-1).to(scores.dtype)  # [B, K, H/K, P + S]
        from_own = probs[..., num_prompt_slots:] @ own_values
        from_prompt = self._gather_rows(probs[..., :num_prompt_slots]) @ prompt_values
        output = from_own + self._scatter_rows(from_prompt)  # [B, K, H/K, d]
        return output.reshape(query.shape[0], 1, query.shape[1], -1)

    def _mask_of_prompts(self, window: int | None) -> Tensor:
        """[G, 1, 1, P]: 0 for tokens that the rows' present tokens attend to, -inf elsewhere."""
        if window is None:
            return self._prompt_mask
        is_token = self._prompts.is_token
        first_seen = self._prompts.lengths + self._num_filled - window  # [G]
        is_near = torch.arange(is_token.shape[1], device=is_token.device) >= first_seen[:, None]
        return additive(is_token & is_near, self._keys.dtype)[:, None, None, :]

    def _index_rows(self) -> None:
        """Index tensors between rows [B] and the rectangle [G, R] of each prompt's rows."""
        groups = self._group_of_row
        is_same = groups[:, None] == groups[None, :]
        place = is_same.tril(-1).sum(dim=1)  # [B] how many earlier rows have the same prompt
        self._num_columns = int(place.max()) + 1
        num_prompts = len(self._prompts.lengths)
        self._slot_of_row = groups * self._num_columns + place  # [B]
        self._row_of_slot = torch.zeros(num_prompts * self._num_columns, dtype=torch.int64, device=groups.device)
        self._row_of_slot[self._slot_of_row] = torch.arange(len(groups), device=groups.device)
        self._prompt_mask = additive(self._prompts.is_token, self._keys.dtype)[:, None, None, :]

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """[B, K, H/K, n] -> [G, K, R * H/K, n]; empty places repeat row 0 and are never read back."""
        _, kv_heads, repeat, size = rows.shape
        by_slot = rows[self._row_of_slot].view(-1, self._num_columns, kv_heads, repeat, size)
        return by_slot.transpose(1, 2).reshape(-1, kv_heads, self._num_columns * repeat, size)

    def _scatter_rows(self, by_prompt: Tensor) -> Tensor:
        """Inverse of `_gather_rows`: [G, K, R * H/K, n] -> [B, K, H/K, n]."""
        num_prompts, kv_heads, rows, size = by_prompt.shape
        by_slot = by_prompt.view(num_prompts, kv_heads, self._num_columns, rows // self._num_columns, size)
        return by_slot.transpose(1, 2).flatten(0, 1)[self._slot_of_row]
