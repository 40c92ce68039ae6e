"""The endless, seeded, resumable stream of training data: prompts, or rows of a fixed data set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

PromptT = TypeVar("PromptT")


@dataclass(slots=True)
class PromptStream(Generic[PromptT]):
    """Goes through all prompts in a new order each epoch. The order is a function of (seed, epoch) alone.

    Example:
        stream = PromptStream(prompts, seed=0)
        stream.next(4)
        state = stream.state()   # {"epoch": 0, "position": 4}
    """

    prompts: Sequence[PromptT]
    seed: int
    shuffle: bool = True
    epoch: int = 0
    position: int = 0  # prompts of this epoch already handed out
    _order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = self._order_of(self.epoch)

    def next(self, count: int) -> list[PromptT]:
        """The next `count` prompts, all different if there are that many; an epoch's end is crossed silently."""
        chosen: list[PromptT] = []
        while len(chosen) < count:
            if self.position == len(self._order):
                self.epoch += 1
                self.position = 0
                self._order = self._order_of(self.epoch)
            chosen.append(self.prompts[self._order[self.position]])
            self.position += 1
        return chosen

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue after `state()` of a stream over the same prompts and seed."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
