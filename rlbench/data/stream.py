"""The endless, seeded, resumable stream of training data: prompts, or rows of a fixed data set."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Generic, TypeVar

PromptT = TypeVar("PromptT")
_TOKENS = ("prompt_token_ids", "token_ids")


@dataclass(slots=True)
class PromptStream(Generic[PromptT]):
    """Goes through all prompts in a new order each epoch. The order is a function of (seed, epoch) alone.

    Example:
        stream = PromptStream(prompts, seed=0)
        stream.next(4)
        state = stream.state()   # {"epoch": 0, "position": 4, "rows": "5f0c..."}
    """

    prompts: Sequence[PromptT]
    seed: int
    shuffle: bool = True
    epoch: int = 0
    position: int = 0  # prompts of this epoch already handed out
    _order: list[int] = field(default_factory=list)
    _rows: str = ""  # fingerprint, once it was asked for

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

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": self._fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after `state()` of a stream over the same prompts and seed.

        Raises:
            ValueError: the prompts are others.
        """
        if state.get("rows", self._fingerprint()) != self._fingerprint():
            raise ValueError(
                f"resume: the {len(self.prompts)} rows of training data are not those that the run began with; "
                "expected unchanged files and data.*, or a new run"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def _fingerprint(self) -> str:
        """Of all tokens and columns, in their order."""
        if not self._rows:
            digest = sha256()
            for prompt in self.prompts:
                parts = [getattr(prompt, name) for name in _TOKENS if hasattr(prompt, name)]
                for tokens in [*parts, *getattr(prompt, "completions", ())]:
                    digest.update(array("q", [len(tokens), *tokens]).tobytes())
                digest.update(repr(getattr(prompt, "columns", "")).encode())
            self._rows = digest.hexdigest()[:16]
        return self._rows

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
