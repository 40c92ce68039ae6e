"""Penalties for completions that are too long or were cut."""

from __future__ import annotations

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase

UNITS = ("tokens", "characters", "words")


class OverlongPenalty:
    """0 up to max_length - buffer, then falling linearly to -1 at max_length and -1 behind it.

        value = 0                                    length <= max_length - buffer
                (max_length - buffer - length) / buffer    up to max_length
                -1                                   above, or cut at the token limit

    Args:
        max_length, buffer: in `unit`; buffer 0 is a step.
        unit: "tokens", "characters" or "words".
        truncated_is_overlong: a completion cut at the token limit scores -1, however long it is.

    Raises:
        ValueError: 0 <= buffer <= max_length does not hold, or an unknown unit.

    Source: soft overlong punishment, DAPO, arXiv:2503.14476, equation 13.
    """

    def __init__(
        self, max_length: int, buffer: int = 0, unit: str = "tokens", truncated_is_overlong: bool = True
    ) -> None:
        if not 0 <= buffer <= max_length or max_length < 1:
            raise ValueError(f"buffer is {buffer} and max_length is {max_length}, expected 0 <= buffer <= max_length")
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}, expected one of: {', '.join(UNITS)}")
        self._max, self._buffer, self._unit = max_length, buffer, unit
        self._truncated_is_overlong = truncated_is_overlong

    def __call__(self, sample: RewardSample) -> RewardOutput:
        length = _length(sample, self._unit)
        if length > self._max or (sample.is_truncated and self._truncated_is_overlong):
            return RewardOutput(value=-1.0, details={"length": length})
        free = self._max - self._buffer
        value = 0.0 if length <= free else (free - length) / self._buffer
        return RewardOutput(value=value, details={"length": length})

    def unit_cases(self) -> list[UnitCase]:
        if self._unit != "characters":
            return [UnitCase(completion="", expected=0.0, num_tokens=0)]
        return [UnitCase(completion="", expected=0.0), UnitCase(completion="x" * (self._max + 1), expected=-1.0)]


def _length(sample: RewardSample, unit: str) -> int:
    if unit == "characters":
        return len(sample.completion)
    if unit == "words":
        return len(sample.completion.split())
    if sample.num_tokens is None:
        raise RewardError("the number of tokens is not known here; expected unit=characters or unit=words")
    return sample.num_tokens
