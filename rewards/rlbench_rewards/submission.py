"""Samples on their way through a pool: calls, the ticket that collects their outcomes, and what sends them off."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlbench_rewards.contract import RewardOutcome, RewardSample
from rlbench_rewards.worker import encode_frame

_FULL_QUEUE_S = 0.1  # between two looks at whether the pool was closed

Scores = list[dict[str, RewardOutcome]]


@dataclass(slots=True)
class Ticket:
    """Outcomes so far of one list of samples, and the future that gets them all, in the order of the samples."""

    outcomes: Scores
    names: Sequence[str]  # of the components
    num_left: int  # outcomes, of all samples and components
    future: Future[Scores] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _num_sent: int = 0  # outcomes that calls are on their way for
    _busy_s: float = 0.0
    _busy_since: float = 0.0

    @classmethod
    def of(cls, num_samples: int, names: Sequence[str]) -> Ticket:
        ticket = cls([{} for _ in range(num_samples)], names, num_samples * len(names))
        if not ticket.num_left:
            ticket.future.set_result(ticket.outcomes)
        return ticket

    def count_sent(self, num_outcomes: int) -> None:
        """A call for so many is on its way; negative: the queue had no room for it."""
        with self.lock:
            if not self._num_sent:
                self._busy_since = time.monotonic()
            self._num_sent += num_outcomes

    def put(self, index: int, name: str, outcome: RewardOutcome) -> None:
        with self.lock:
            self.outcomes[index][name] = outcome
            self.num_left -= 1
            self._num_sent -= 1
            if not self._num_sent:
                self._busy_s += time.monotonic() - self._busy_since
            if not self.num_left and not self.future.done():
                self.future.set_result([{name: found[name] for name in self.names} for found in self.outcomes])

    def fail(self, error: BaseException) -> None:
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)

    def busy_s(self) -> float:
        """Seconds in which at least one of its calls was on its way or being worked on."""
        with self.lock:
            return self._busy_s + (time.monotonic() - self._busy_since if self._num_sent else 0.0)


@dataclass(frozen=True, slots=True)
class Call:
    ticket: Ticket
    name: str  # of the component
    indices: tuple[int, ...]  # of the samples
    samples: tuple[dict[str, Any], ...]

    def key(self) -> bytes:
        """Of the component and what it scores; for calls of one sample."""
        return hashlib.sha256(encode_frame([self.name, self.samples])).digest()

    def split(self) -> list[Call]:
        return [Call(self.ticket, self.name, (i,), (s,)) for i, s in zip(self.indices, self.samples, strict=True)]


class Submission:
    """Samples that are given to a pool one by one, in any order, by one thread.

    A call holds what it would hold had all been there at once, `batch_size` neighbours by index, and is sent off as
    soon as they are there.
    """

    def __init__(
        self,
        num_samples: int,
        batch_sizes: Mapping[str, int],
        calls: queue.Queue[Call | None],
        is_closed: Callable[[], bool],
    ) -> None:
        """
        Args:
            batch_sizes: by component.
            calls: the pool's queue.
            is_closed: whether the pool is; then nothing is sent any more.
        """
        self._ticket = Ticket.of(num_samples, list(batch_sizes))
        self._batch_sizes = batch_sizes
        self._samples: list[dict[str, Any] | None] = [None] * num_samples
        self._num_there: Counter[tuple[str, int]] = Counter()  # samples, by component and start of their batch
        self._calls = calls
        self._is_closed = is_closed
        self._held: deque[Call] = deque()  # while the queue is full

    def has(self, index: int) -> bool:
        return self._samples[index] is not None

    def put(self, index: int, sample: RewardSample) -> None:
        """Never waits and never raises: calls that the queue has no room for are sent with a later one."""
        self._samples[index] = _plain(sample)
        for name, size in self._batch_sizes.items():
            start = index - index % size
            end = min(start + size, len(self._samples))
            self._num_there[name, start] += 1
            if self._num_there[name, start] == end - start:
                batch = tuple(sample for sample in self._samples[start:end] if sample is not None)
                self._held.append(Call(self._ticket, name, tuple(range(start, end)), batch))
        try:
            while self._held:
                self._send(self._held[0], block=False)
                self._held.popleft()
        except queue.Full:
            return

    def close(self) -> Future[Scores]:
        """Send what is held back, waiting for room; all samples must be there. The future of all outcomes.

        It raises RuntimeError if the pool is closed meanwhile or its workers do not start any more.
        """
        assert all(sample is not None for sample in self._samples)
        while self._held:
            try:
                self._send(self._held[0], block=True)
                self._held.popleft()
            except queue.Full:
                continue
        return self._ticket.future

    def busy_s(self) -> float:
        """Seconds in which at least one call was on its way or being worked on."""
        return self._ticket.busy_s()

    def _send(self, call: Call, *, block: bool) -> None:
        if not self._is_closed():
            self._ticket.count_sent(len(call.indices))
            try:
                self._calls.put(call, block, _FULL_QUEUE_S)
            except queue.Full:
                self._ticket.count_sent(-len(call.indices))
                raise
        if self._is_closed():
            self._ticket.fail(RuntimeError("the reward pool was closed"))


def _plain(sample: RewardSample) -> dict[str, Any]:
    plain = {name: getattr(sample, name) for name in RewardSample.__slots__}
    plain["columns"] = dict(sample.columns)
    return plain
