"""Out of device memory in an update: its gradient again, from microbatches of half the tokens.

It is the same gradient, but with algorithm.normalization=microbatch_token_mean, which depends on the split. What finds
no memory elsewhere ends the run with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import TypeVar

import torch
from torch import Tensor

from rlbench.data.packing import Microbatch, num_packed_tokens, pack
from rlbench.records import TrainingSample

ResultT = TypeVar("ResultT")
Columns = Mapping[str, Tensor]  # [N] each


class RunMemoryError(Exception):
    """A phase of a run does not fit in memory."""


_OF_GENERATION = "engine.max_num_seqs, sampling.max_tokens"
_SMALLER = {  # the settings that make a phase smaller
    "generation": _OF_GENERATION,
    "evaluation": f"training.tokens_per_microbatch; of stage=rl {_OF_GENERATION}",
    "identity": "checks.identity_tokens",
    "weight sync": "lora.rank",
}


@contextmanager
def phase_memory(phase: str) -> Iterator[None]:
    """Around a phase: its torch.OutOfMemoryError becomes a sentence.

    Raises:
        RunMemoryError: names the phase and the settings that make it smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        empty_cache()
        keys = _SMALLER.get(phase, "training.tokens_per_microbatch")
        raise RunMemoryError(f"{phase} does not fit in memory: {_first_line(error)}; expected lower {keys}") from error


@dataclass(slots=True)
class MicrobatchBudget:
    """training.tokens_per_microbatch of a run; once halved, it stays so.

    Example:
        MicrobatchBudget(8192, console.warning)
    """

    tokens: int
    announce: Callable[[str], None]
    num_halvings: int = 0
    _configured: int = field(init=False)

    def __post_init__(self) -> None:
        self._configured = self.tokens

    def room_for(self, num_tokens: int) -> int:
        """The budget, or more, up to what is configured, where a sample of `num_tokens` would not fit."""
        return max(self.tokens, min(self._configured, num_tokens))

    def attempt(self, units: Sequence[Sequence[TrainingSample]], compute: Callable[[int], ResultT]) -> ResultT:
        """`compute(tokens)`, again with half the tokens as long as it raises torch.OutOfMemoryError.

        Args:
            units: samples of the update that stay in one microbatch; they bound the budget from both sides.
            compute: packs for that budget and begins its gradient from zero; changes nothing before it returns.

        Raises:
            RunMemoryError: not even one unit a microbatch fits.
        """
        sizes = [num_packed_tokens(unit) for unit in units]
        while True:
            try:
                return compute(self.room_for(max(sizes)))
            except torch.OutOfMemoryError as error:
                reason = _first_line(error)
            # Outside of the except block: the error holds the frames, and with them the tensors of the failed pass.
            empty_cache()
            self._halve(sizes, len(units[0]), reason)

    def _halve(self, sizes: Sequence[int], unit_size: int, reason: str) -> None:
        longest = max(sizes)
        in_use = min(self.room_for(longest), sum(sizes))
        if in_use <= longest:
            raise RunMemoryError(
                f"the update does not fit in memory with {'one sample' if unit_size == 1 else 'one pair'} a microbatch "
                f"({longest} tokens): {reason}; expected less to keep: training.recompute=full, training.offload=true "
                "or shorter completions (sampling.max_tokens)"
            )
        before, self.tokens = self.tokens, max(longest, in_use // 2)
        self.num_halvings += 1
        self.announce(
            f"out of memory in the update ({reason}): training.tokens_per_microbatch is {self.tokens} instead of "
            f"{before} from here on, and the gradient is computed again"
        )


def empty_cache() -> None:
    """Give what torch keeps of the device's memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]


def split_microbatches(microbatches: Sequence[Microbatch], tokens: int) -> list[Microbatch]:
    """Those of more than `tokens` tokens as several each; a group stays whole where it fits."""
    return [
        part
        for microbatch in microbatches
        for part in (
            [microbatch]
            if len(microbatch.token_ids) <= tokens
            else pack(microbatch.samples, tokens_per_microbatch=tokens, device=microbatch.token_ids.device)
        )
    ]


def fitted(
    microbatches: Sequence[Microbatch], columns: Sequence[Columns], tokens: int
) -> tuple[Sequence[Microbatch], Sequence[Columns]]:
    """The same, or the same samples in microbatches of at most `tokens`, each with its part of the columns."""
    if all(len(microbatch.token_ids) <= tokens for microbatch in microbatches):
        return microbatches, columns
    of_sample: dict[int, Columns] = {}  # by id: samples may be equal and differ in what was drawn for them
    for microbatch, fixed in zip(microbatches, columns, strict=True):
        parts = {name: _by_sample(column, microbatch) for name, column in fixed.items()}
        for index, sample in enumerate(microbatch.samples):
            of_sample[id(sample)] = {name: of_samples[index] for name, of_samples in parts.items()}
    samples = [sample for microbatch in microbatches for sample in microbatch.samples]
    packed = pack(samples, tokens_per_microbatch=tokens, device=microbatches[0].token_ids.device)
    return packed, [
        {name: torch.cat([of_sample[id(sample)][name] for sample in microbatch.samples]) for name in columns[0]}
        for microbatch in packed
    ]


def as_before(values: list[Tensor], packed: Sequence[Microbatch], before: Sequence[Microbatch]) -> list[Tensor]:
    """Values [N] of `packed`, in the order of the microbatches that it was made of."""
    if packed is before:
        return values
    of_sample = {
        id(sample): part
        for microbatch, column in zip(packed, values, strict=True)
        for sample, part in zip(microbatch.samples, _by_sample(column, microbatch), strict=True)
    }
    return [torch.cat([of_sample[id(sample)] for sample in microbatch.samples]) for microbatch in before]


def _by_sample(column: Tensor, microbatch: Microbatch) -> Sequence[Tensor]:
    return column.split([len(sample.token_ids) for sample in microbatch.samples])
