"""Causal attention over a packed row of groups, each a prompt and completions that all attend to it.

A prompt token attends causally within its prompt; a completion token to its group's whole prompt and causally to its
own completion. The prompt's keys and values exist once.

On CUDA in 16 bits this is flash attention in one of two forms. Keys are gathered, each completion's behind a copy of
its prompt's, for one call (`gathered_attention`); where prompts are so long and completions so short that the copies
would cost more than they save, there are two calls: A, causal within every prompt and completion, and B, from a group's
completions to its prompt. With lse the log of a row's softmax denominator,
lse = logaddexp(lse_A, lse_B) and out = exp(lse_A - lse) out_A + exp(lse_B - lse) out_B. The backward kernel needs of
the forward pass only out and lse; given the joined ones, A and B yield each their part of the gradients.

Backends: "flash4", the package flash-attn-4 where it is installed and there is enough work to hide its slower launch;
"flash", torch's own; "flex", torch's FlexAttention; "reference", anywhere. RLBENCH_ATTENTION names one; the
default is auto. A sliding window is computed by all but flash4, capped scores by flex (`flexible_attention`) and the
reference.

Shapes: T packed tokens, C completion tokens, P prompt tokens, Hq query heads, Hk key heads, d features of a head.
Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; joining parts, Milakov and Gimelshein, arXiv:1805.02867.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels import flash_attention_2, flash_attention_4
from rlbench_kernels.gathered_attention import GatheredKeys, gathered_attention
from rlbench_kernels.launch import use_triton
from rlbench_kernels.masked_attention import additive, masked_attention

BACKENDS = ("auto", "flash4", "flash", "flex", "reference")
_MAX_HEAD_DIM = 256
_MANY_NUMBERS = 2**24  # in q: below, its slower launch is not hidden by the device's work


@dataclass(frozen=True, slots=True, eq=False)
class SharedPromptLayout:
    """Where prompts and completions lie in the packed row: group after group, the prompt first.

    Example:
        >>> layout = SharedPromptLayout.from_lengths([(3, [2, 1])], torch.device("cpu"))
        >>> layout.sequence_starts.tolist(), layout.completion_rows.tolist()
        ([0, 3, 5, 6], [3, 4, 5])
    """

    sequence_starts: Tensor  # int32 [prompts and completions + 1], bounds of each in the packed row
    part_starts: Tensor  # int32 [2 groups + 1], bounds of each prompt and of all completions behind it
    key_starts: Tensor  # int32 [2 groups + 1], bounds in `prompt_rows` of what those parts see: nothing, the prompt
    prompt_rows: Tensor  # int64 [P]
    completion_rows: Tensor  # int64 [C]
    max_sequence: int
    max_completions: int  # tokens of all completions of one group
    max_prompt: int
    num_gathered: int  # keys of `gathered_keys` without a window
    groups: tuple[tuple[int, tuple[int, ...]], ...]  # lengths of each prompt and of its completions that share it
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)  # for each window, by backend

    @classmethod
    def from_lengths(
        cls, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str
    ) -> SharedPromptLayout:
        """A prompt with one completion is one sequence: nothing is shared.

        Args:
            groups: (prompt length, completion lengths) of each group in packed order; a completion may be empty.
            device: of the tensors.

        Raises:
            ValueError: no group, or an empty prompt.
        """
        if not groups or any(prompt < 1 for prompt, _ in groups):
            raise ValueError(f"at least one group and prompts of at least one token expected, got {list(groups)[:3]}")
        groups = [(prompt + sum(c), []) if sum(n > 0 for n in c) < 2 else (prompt, c) for prompt, c in groups]
        lengths = [n for prompt, completions in groups for n in (prompt, *completions) if n]
        prompts, of_completions = [prompt for prompt, _ in groups], [sum(c) for _, c in groups]
        is_completion = torch.repeat_interleave(
            torch.tensor([False, True]).repeat(len(groups)),
            torch.tensor([n for pair in zip(prompts, of_completions, strict=True) for n in pair]),
        )

        def starts(values: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(values)], dtype=torch.int32, device=device)

        return cls(
            sequence_starts=starts(lengths),
            part_starts=starts([n for pair in zip(prompts, of_completions, strict=True) for n in pair]),
            key_starts=starts([n for prompt in prompts for n in (0, prompt)]),
            prompt_rows=(~is_completion).nonzero()[:, 0].to(device),
            completion_rows=is_completion.nonzero()[:, 0].to(device),
            max_sequence=max(lengths),
            max_completions=max(of_completions),
            max_prompt=max(prompts),
            num_gathered=sum(prompt + sum(prompt + n for n in c if n) for prompt, c in groups),
            groups=tuple((prompt, tuple(completions)) for prompt, completions in groups),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_rows) + len(self.completion_rows)

    @property
    def max_context(self) -> int:
        """Tokens of the longest prompt with its longest completion."""
        return max(prompt + max(completions, default=0) for prompt, completions in self.groups)

    def gathered_keys(self, window: int | None) -> GatheredKeys:
        key = "flash", window
        if key not in self._made:
            self._made[key] = GatheredKeys.from_groups(self.groups, window, self.prompt_rows.device)
        return self._made[key]

    def block_mask(self, window: int | None) -> Any:
        from rlbench_kernels.flexible_attention import block_mask

        key = "flex", window
        if key not in self._made:
            self._made[key] = block_mask(self.groups, window, self.prompt_rows.device)
        return self._made[key]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPromptLayout, *, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(cap(scale q k^T)) v over the keys that each row may see, cap(z) = softcap tanh(z / softcap).

    Args:
        q: [T, Hq, d].
        k, v: [T, Hk, d], Hq a multiple of Hk; rotary embeddings already applied.
        layout: see `SharedPromptLayout`; a group's completions are positioned right after its prompt.
        scale: of the scores, usually d ** -0.5.
        window: a token sees itself and the window - 1 positions before it; None: all before it.
        softcap: > 0, or None.

    Returns:
        [T, Hq, d] in q's dtype, differentiable to q, k and v. On CUDA in 16 bits gradients differ in the last bit
        from run to run unless `torch.use_deterministic_algorithms(True)` is set.

    Raises:
        ValueError: shapes that do not fit, a window or a softcap that is not above 0.
    """
    _check(q, k, v, layout, window, softcap)
    if window is not None and window >= layout.max_context:
        window = None
    backend = packed_attention_backend(q, window=window, softcap=softcap)
    if backend == "reference":
        return reference_attention(q, k, v, layout, scale=scale, window=window, softcap=softcap)
    if backend == "flex":
        from rlbench_kernels.flexible_attention import flexible_attention

        return flexible_attention(q, k, v, layout.block_mask(window), scale=scale, softcap=softcap)
    flash = flash_attention_4 if backend == "flash4" else flash_attention_2
    if window is not None or _is_gathered(layout, q.shape[1] // k.shape[1]):
        return gathered_attention(
            q, k, v, layout.sequence_starts, layout.max_sequence, layout.gathered_keys(window), flash, scale=scale,
            window=window,
        )  # fmt: skip
    return _FlashAttention.apply(q, k, v, layout, scale, flash)  # pyright: ignore[reportReturnType]


def _is_gathered(layout: SharedPromptLayout, queries_per_key: int) -> bool:
    """Whether copies of the prompts' keys are cheaper than a second call over all queries: a line through what an H200
    took with 1, 4 and 6 query heads a key head (kernels/benchmarks/results/attention_forms_h200.json)."""
    has_shared = len(layout.completion_rows) > 0
    return has_shared and layout.num_gathered <= (1.5 + queries_per_key / 2) * layout.num_tokens


def packed_attention_backend(q: Tensor, *, window: int | None = None, softcap: float | None = None) -> str:
    """ "flash4", "flash", "flex" or "reference": what `packed_attention` runs for queries like `q` [T, Hq, d].

    Args:
        q: only its device, dtype and shape are looked at.
        window, softcap: as in `packed_attention`.

    Raises:
        ValueError: RLBENCH_ATTENTION is unknown or names what cannot run for `q`.
    """
    asked = os.environ.get("RLBENCH_ATTENTION", "auto")
    if asked not in BACKENDS:
        raise ValueError(f"RLBENCH_ATTENTION={asked!r}: expected one of {', '.join(BACKENDS)}")
    problems = {name: _problem(name, q, window, softcap) for name in ("flash4", "flash", "flex")}
    if problem := problems.get(asked):
        raise ValueError(f"RLBENCH_ATTENTION={asked} cannot run: {problem}; expected auto or reference")
    if asked != "auto":
        return asked
    is_large = q.shape[0] * q.shape[1] * q.shape[2] >= _MANY_NUMBERS
    order = ["flash4"] * is_large + ["flash"] + ["flex"] * (softcap is not None)
    return next((name for name in order if not problems[name]), "reference")


def _problem(backend: str, q: Tensor, window: int | None, softcap: float | None) -> str:
    """Why one of the three for CUDA cannot run; empty where it can."""
    is_fit = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if not (is_fit and q.shape[2] % 8 == 0 and q.shape[2] <= _MAX_HEAD_DIM):
        return f"{q.dtype} on {q.device.type}, heads of {q.shape[2]}"
    if backend == "flex":
        return ""
    if softcap is not None:
        return f"the model caps attention scores at {softcap}, which {backend} does not compute"
    if backend == "flash":
        return ""
    if window is not None:
        return f"the model has a sliding window of {window} tokens, which flash4 is not used for"
    return flash_attention_4.problem(q.device)


def describe_backend(device: torch.device, *, window: int | None = None, softcap: float | None = None) -> str:
    """One line for people: what `packed_attention` runs on `device` in 16 bits, for a model with these features."""
    if device.type != "cuda":
        return f"the reference in PyTorch: no kernels for {device.type}"
    asked = os.environ.get("RLBENCH_ATTENTION", "auto")
    if asked != "auto":
        return f"{asked}, as RLBENCH_ATTENTION says"
    if softcap is not None:
        return f"torch's FlexAttention (scores are capped at {softcap}); its first calls compile"
    windowed = "" if window is None else f"; with windows of {window} tokens torch's flash attention"
    if problem := flash_attention_4.problem(device):
        return f"torch's flash attention ({problem})"
    return f"FlashAttention 4 for large batches, else torch's flash attention{windowed}"


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPromptLayout, *, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """As `packed_attention` by one masked attention a group: the meaning of the op."""
    starts = layout.part_starts.tolist()
    parts = []
    for start, middle, stop in zip(starts[::2], starts[1::2], starts[2::2], strict=False):
        rows = torch.arange(start, stop, device=q.device)
        sequence = torch.bucketize(rows, layout.sequence_starts, right=True)
        is_visible = (sequence[:, None] == sequence[None, :]) | (rows < middle)[None, :]
        is_visible &= rows[None, :] <= rows[:, None]
        if window is not None:
            position = rows - layout.sequence_starts[sequence - 1] + (rows >= middle) * (middle - start)
            is_visible &= position[:, None] - position[None, :] < window
        query, *others = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in others)
        found = masked_attention(query, key, value, additive(is_visible, q.dtype), scale=scale, softcap=softcap)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: SharedPromptLayout, scale: float, flash: ModuleType
    ) -> Tensor:
        out, lse, *state = flash.forward(q, k, v, *_within(layout), is_causal=True, scale=scale)
        state_of_prompts: list[Tensor] = []
        if len(layout.completion_rows):
            keys, values = k[layout.prompt_rows], v[layout.prompt_rows]
            of_prompts, prompt_lse, *state_of_prompts = flash.forward(
                q, keys, values, *_to_prompts(layout), is_causal=False, scale=scale
            )
            join_parts(out, lse, of_prompts, prompt_lse, layout.completion_rows)
        ctx.save_for_backward(q, k, v, out, lse, *state, *state_of_prompts)
        ctx.layout, ctx.scale, ctx.flash = layout, scale, flash
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, *states = ctx.saved_tensors
        layout, scale, grad = ctx.layout, ctx.scale, grad.contiguous()
        gradients = ctx.flash.gradients
        grads = gradients(grad, q, k, v, out, lse, *_within(layout), states[:2], is_causal=True, scale=scale)
        prompts = layout.prompt_rows
        if len(layout.completion_rows):
            grad_q, *grads_of_prompts = gradients(
                grad, q, k[prompts], v[prompts], out, lse, *_to_prompts(layout), states[2:], is_causal=False,
                scale=scale,
            )  # fmt: skip
            grads[0].add_(grad_q)
            for total, part in zip(grads[1:], grads_of_prompts, strict=True):
                total.index_add_(0, prompts, part)
        return *grads, None, None, None


def join_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    """In `rows`, add another part of the softmax to `out` [T, Hq, d] and `lse` [Hq, T], in place.

    Args:
        out, other: [T, Hq, d], one dtype.
        lse, other_lse: float32 [Hq, T].
        rows: int64 [C]; other rows stay as they are.
    """
    if use_triton(out.device):
        from rlbench_kernels.packed_attention_triton import launch_join

        launch_join(out, lse, other, other_lse, rows)
        return
    mine, theirs = lse[:, rows], other_lse[:, rows]
    joined = torch.logaddexp(mine, theirs)
    weights = [(part - joined).exp().T[:, :, None] for part in (mine, theirs)]  # [C, Hq, 1]
    out.index_copy_(0, rows, (out[rows] * weights[0] + other[rows] * weights[1]).to(out.dtype))
    lse.index_copy_(1, rows, joined)


def _within(layout: SharedPromptLayout) -> tuple[Tensor, Tensor, int, int]:
    """Bounds and longest lengths of queries and keys of call A."""
    return layout.sequence_starts, layout.sequence_starts, layout.max_sequence, layout.max_sequence


def _to_prompts(layout: SharedPromptLayout) -> tuple[Tensor, Tensor, int, int]:
    """Of call B: every row is a query, so that none is gathered; prompt rows see no key."""
    return layout.part_starts, layout.key_starts, max(layout.max_completions, layout.max_prompt), layout.max_prompt


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPromptLayout, window: int | None, softcap: float | None
) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q [T, Hq, d], k and v [T, Hk, d] expected, got {[*q.shape]}, {[*k.shape]} and {[*v.shape]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if layout.num_tokens != len(q):
        raise ValueError(f"the layout has {layout.num_tokens} tokens, q has {len(q)}")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window and softcap: above 0 expected, got {window} and {softcap}")
