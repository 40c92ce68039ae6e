"""Rewards from a service of your own: a reward model, a step-wise reward model, a sandbox farm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample
from rlbench_rewards.http_client import HttpOptions, JsonClient


class RemoteReward:
    """The service's number for each sample.

    Request: {"samples": [{"prompt", "completion", "columns"}]}. Reply: {"rewards": [number or null]}, as long; null
    means that the reward does not apply. One request holds `request_size` samples; several run side by side. Set the
    component's batch_size to as many samples as one call of the worker may hold, and its timeout_s accordingly.

    Args:
        url: of the service.
        columns: of the row to send; null: all.
        request_size: samples of one request.
        headers: sent with every request; a value "$NAME" is read from the environment.
        options: see `HttpOptions`.

    Raises:
        ValueError: not an address, an unknown option, or a header's variable that is not set.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[str] | None = None,
        request_size: int = 8,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        if request_size < 1:
            raise ValueError(f"request_size is {request_size}, expected at least 1")
        self._client = JsonClient(url, with_secrets(headers or {}), http_options(options))
        self._columns = None if columns is None else tuple(columns)
        self._size = request_size
        self.required_columns = self._columns or ()

    async def score_batch(self, samples: Sequence[RewardSample]) -> list[RewardOutput]:
        chunks = [samples[start : start + self._size] for start in range(0, len(samples), self._size)]
        bodies = [{"samples": [self._plain(sample) for sample in chunk]} for chunk in chunks]
        sizes = {len(chunk) for chunk in chunks}
        replies = await self._client.post_all(bodies, lambda reply: _numbers(reply, sizes))
        outputs: list[RewardOutput] = []
        for chunk, reply in zip(chunks, replies, strict=True):
            if isinstance(reply, RewardError):
                raise reply
            if len(reply) != len(chunk):
                raise RewardError(f"the service returned {len(reply)} rewards for {len(chunk)} samples")
            outputs += [RewardOutput(value=number) for number in reply]
        return outputs

    def _plain(self, sample: RewardSample) -> dict[str, Any]:
        names = sample.columns if self._columns is None else self._columns
        columns = {name: sample.columns[name] for name in names}
        return {"prompt": sample.prompt, "completion": sample.completion, "columns": columns}


def _numbers(reply: Any, sizes: set[int]) -> list[float | None]:
    rewards = reply.get("rewards") if isinstance(reply, dict) else None
    if not isinstance(rewards, list) or len(rewards) not in sizes:
        raise RewardError(f'the reply is {str(reply)[:100]}, expected {{"rewards": [a number for each sample]}}')
    for value in rewards:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            raise RewardError(f"the service returned {value!r}, expected a finite number or null")
    return rewards


def http_options(options: Mapping[str, Any]) -> HttpOptions:
    """Raises: ValueError for an option that HttpOptions does not have."""
    unknown = [name for name in options if name not in HttpOptions.__slots__]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]!r}, expected some of: {', '.join(HttpOptions.__slots__)}")
    return HttpOptions(**options)


def with_secrets(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with "$NAME" replaced from the environment.

    Raises:
        ValueError: the variable is not set.
    """
    import os

    filled = {}
    for name, value in headers.items():
        head, mark, variable = value.rpartition("$")
        if mark and variable not in os.environ:
            raise ValueError(f"headers.{name} reads ${variable} from the environment, where it is not set")
        filled[name] = head + os.environ[variable] if mark else value
    return filled
