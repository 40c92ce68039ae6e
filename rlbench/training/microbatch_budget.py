"""Out of device memory in an update: its gradient again, from microbatches of half the tokens.

It is the same gradient, but with algorithm.normalization=microbatch_token_mean, which depends on the split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlbench.data.packing import Microbatch, num_packed_tokens, pack
from rlbench.records import TrainingSample

ResultT = TypeVar("ResultT")
Columns = Mapping[str, Tensor]  # [N] each


class UpdateMemoryError(Exception):
    """An update does not fit in memory, however small its microbatches."""


@dataclass(slots=True)
class MicrobatchBudget:
    """training.tokens_per_microbatch of a run; once halved, it stays so.

    Example:
        MicrobatchBudget(8192, console.warning)
    """

    tokens: int
    announce: Callable[[str], None]
    num_halvings: int = 0

    def attempt(self, samples: Sequence[TrainingSample], compute: Callable[[int], ResultT]) -> ResultT:
        """`compute(tokens)`, again with half the tokens as long as it raises torch.OutOfMemoryError.

        Args:
            samples: of the update, which bound the budget from both sides.
            compute: packs for that budget and begins its gradient from zero; changes nothing before it returns.

        Raises:
            UpdateMemoryError: not even one sample a microbatch fits.
        """
        while True:
            try:
                return compute(self.tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).split("\n")[0][:200]
            # Outside of the except block: the error holds the frames, and with them the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(samples, reason)

    def _halve(self, samples: Sequence[TrainingSample], reason: str) -> None:
        longest = max(num_packed_tokens([sample]) for sample in samples)
        in_use = min(self.tokens, sum(num_packed_tokens([sample]) for sample in samples))
        if in_use <= longest:
            raise UpdateMemoryError(
                f"the update does not fit in memory with one sample a microbatch ({longest} tokens): {reason}; "
                "expected less to keep: training.recompute=full, training.offload=true or a lower sampling.max_tokens"
            )
        before, self.tokens = self.tokens, max(longest, in_use // 2)
        self.num_halvings += 1
        self.announce(
            f"out of memory in the update ({reason}): training.tokens_per_microbatch is {self.tokens} instead of "
            f"{before} from here on, and the gradient is computed again"
        )


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
