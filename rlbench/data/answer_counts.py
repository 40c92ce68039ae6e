"""Right and wrong answers to each prompt, with prompts of equal counts known as one kind: what depends on the counts
alone is computed once a kind.

Shapes: N prompts, K kinds.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Counts = tuple[float, float]  # right and wrong answers; older ones may count for less than 1
_NONE: Counts = (0.0, 0.0)


class AnswerCounts:
    """
    Attributes:
        kind_of: int32 [N], row of each prompt in `kinds`; 0 is that of prompts without answers.

    Example:
        counts = AnswerCounts(["train/0", "train/1"])
        counts.set("train/1", (1.0, 3.0))
        counts.kinds()   # right [0, 1], wrong [0, 3]; counts.kind_of is [0, 1]
    """

    def __init__(self, prompt_ids: Sequence[str]) -> None:
        """
        Args:
            prompt_ids: all different.
        """
        self._places = {name: place for place, name in enumerate(prompt_ids)}
        self._measured: dict[str, Counts] = {}
        self._begin()

    def __len__(self) -> int:
        """Prompts that have answers."""
        return len(self._measured)

    def __getitem__(self, prompt_id: str) -> Counts:
        return self._measured.get(prompt_id, _NONE)

    def set(self, prompt_id: str, counts: Counts) -> None:
        """Put these counts in place of the prompt's earlier ones."""
        self._count(self[prompt_id], -1)
        self._count(counts, 1)
        self._measured[prompt_id] = counts
        self.kind_of[self._places[prompt_id]] = self._kind(counts)
        if len(self._rows) > 2 * len(self._places) + 2:  # most are of no prompt any more
            self.restore(self.state())

    def kinds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Right and wrong answers of each kind, [K] both."""
        return np.array(self._right), np.array(self._wrong)

    def totals(self) -> Counts:
        """Of all prompts, each sum rounded once: it does not depend on the order of the answers."""
        return float(self._totals[0]), float(self._totals[1])

    def state(self) -> dict[str, Counts]:
        """By prompt_id, of those that have answers."""
        return dict(self._measured)

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take back what `state` gave; prompts that are not there any more are forgotten."""
        self._measured = {name: (right, wrong) for name, (right, wrong) in state.items() if name in self._places}
        self._begin()
        places = [self._places[name] for name in self._measured]
        self.kind_of[places] = [self._kind(counts) for counts in self._measured.values()]
        for counts, times in zip(self._rows, np.bincount(self.kind_of, minlength=len(self._rows)), strict=True):
            self._count(counts, int(times))

    def _begin(self) -> None:
        """Without any answers."""
        self.kind_of = np.zeros(len(self._places), np.int32)
        self._rows: dict[Counts, int] = {}
        self._right, self._wrong = array("d"), array("d")  # of each row
        self._totals = (Fraction(0), Fraction(0))
        self._kind(_NONE)

    def _kind(self, counts: Counts) -> int:
        row = self._rows.setdefault(counts, len(self._rows))
        if row == len(self._right):
            self._right.append(counts[0])
            self._wrong.append(counts[1])
        return row

    def _count(self, counts: Counts, times: int) -> None:
        right, wrong = self._totals
        self._totals = (right + times * Fraction(counts[0]), wrong + times * Fraction(counts[1]))
