"""What happened to the calls of a pool since it was last asked, as metrics."""

from __future__ import annotations

import threading
from collections import Counter, deque

_MAX_LATENCIES = 100_000

RESTARTS, RETRIES, QUARANTINED = "num_restarts", "num_retries", "num_quarantined"


class PoolStats:
    """Counters of a pool; safe to use from its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_MAX_LATENCIES)
        self._overlapped_s = 0.0
        self.num_events = 0  # outcomes, retries and restarts since the start

    def count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1
            self.num_events += 1

    def add_outcome(self, status: str, latency_s: float) -> None:
        with self._lock:
            self._counts[f"num_{status}"] += 1
            self.num_events += 1
            self._latencies.append(latency_s)

    def add_overlapped(self, seconds: float) -> None:
        """Time in which rewards were computed before anyone waited for them."""
        with self._lock:
            self._overlapped_s += seconds

    def take(self) -> dict[str, float]:
        """`reward_pool/...`: counts of outcomes, restarts, retries and quarantined samples; seconds that were hidden
        behind other work; latency percentiles."""
        with self._lock:
            counts, latencies = self._counts, sorted(self._latencies)
            overlapped_s, self._overlapped_s = self._overlapped_s, 0.0
            self._counts, self._latencies = Counter(), deque(maxlen=_MAX_LATENCIES)
        names = ("num_value", "num_error", "num_timeout", "num_skipped", RESTARTS, RETRIES, QUARANTINED)
        metrics = {f"reward_pool/{name}": float(counts[name]) for name in names}
        metrics["reward_pool/overlapped_s"] = overlapped_s
        if latencies:
            metrics |= {
                f"reward_pool/latency_p{percent}_s": latencies[int(percent / 100 * (len(latencies) - 1))]
                for percent in (50, 99)
            }
        return metrics
