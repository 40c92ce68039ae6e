"""Which masks LoRA's dropout takes: counters, not a stream, so that recomputation and resumption find the same ones.

A mask's seed is a function of (run seed, step, number of the training forward in the step, layer). `Policy.hidden`
names the forward while it runs; recomputation names it again in the backward pass. Outside of a training forward
nothing is dropped, whatever mode the modules are in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from rlbench_kernels import LoraDropout, seeded_dropout


@dataclass(frozen=True, slots=True)
class TrainingForward:
    """One forward pass whose gradient is wanted.

    Example:
        TrainingForward(run_seed=0, step=3, index=1).seed("model.layers.0.mlp.up_proj")
    """

    run_seed: int
    step: int  # optimizer step, from 1
    index: int  # of the forward in the step, from 0

    def seed(self, layer: str) -> int:
        """First 63 bits of SHA-256 over (run_seed, step, index, layer)."""
        key = f"{self.run_seed}\x1f{self.step}\x1f{self.index}\x1f{layer}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


_CURRENT: ContextVar[TrainingForward | None] = ContextVar("training_forward", default=None)


def current_forward() -> TrainingForward | None:
    """That runs now; None: nothing is dropped."""
    return _CURRENT.get()


@contextmanager
def forward_of(forward: TrainingForward | None) -> Iterator[None]:
    """Inside, it is the current one; in this thread alone."""
    token = _CURRENT.set(forward)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class ForwardCounter:
    """Numbers the training forwards of a policy."""

    def __init__(self, run_seed: int) -> None:
        self._run_seed = run_seed
        self._is_rehearsal = False
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Count from 0 again."""
        self._step, self._index = step, 0

    def next(self) -> TrainingForward | None:
        """None without gradient, but in a rehearsal."""
        if not (torch.is_grad_enabled() or self._is_rehearsal):
            return None
        forward = TrainingForward(self._run_seed, self._step, self._index)
        self._index += 1
        return forward

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """As `Policy.rehearsal`."""
        before, self._is_rehearsal = self._index, True
        try:
            yield
        finally:
            self._index, self._is_rehearsal = before, False


class SeededDropout(nn.Module):
    """In place of the nn.Dropout of a PEFT layer."""

    def __init__(self, p: float, layer: str) -> None:
        """
        Args:
            p: in (0, 1).
            layer: path of the adapted linear layer inside the base model.
        """
        super().__init__()
        self.p, self.layer = p, layer

    def current(self) -> LoraDropout | None:
        """Of the current forward; None: nothing is dropped."""
        forward = current_forward()
        return None if forward is None else LoraDropout(self.p, forward.seed(self.layer))

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.current()
        return x if dropout is None else seeded_dropout(x, dropout)


def current_dropout(layer: nn.Module, adapter: str) -> LoraDropout | None:
    """Of a linear layer in the current forward; None: it has no adapter, or drops nothing."""
    module: Any = layer.lora_dropout[adapter] if isinstance(layer, PeftLinear) else None
    return module.current() if isinstance(module, SeededDropout) else None
