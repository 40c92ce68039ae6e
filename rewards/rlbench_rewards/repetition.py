"""Penalty for text that repeats itself."""

from __future__ import annotations

from rlbench_rewards.contract import RewardOutput, RewardSample, UnitCase

_MAX_WORDS = 100_000


class RepetitionPenalty:
    """-(1 - different n-grams / all n-grams) * max_penalty, over words; 0 for completions shorter than one n-gram.

    Args:
        ngram_size: words of an n-gram.
        max_penalty: the penalty that endless repetition approaches, > 0.

    Raises:
        ValueError: ngram_size < 1 or max_penalty <= 0.

    Source: arXiv:2502.03373, appendix on the repetition penalty.
    """

    def __init__(self, ngram_size: int = 20, max_penalty: float = 1.0) -> None:
        if ngram_size < 1 or max_penalty <= 0:
            raise ValueError(f"ngram_size is {ngram_size}, max_penalty is {max_penalty}, expected >= 1 and > 0")
        self._size, self._max = ngram_size, max_penalty

    def __call__(self, sample: RewardSample) -> RewardOutput:
        words = sample.completion.lower().split()[:_MAX_WORDS]
        num_ngrams = len(words) - self._size + 1
        if num_ngrams < 1:
            return RewardOutput(value=0.0)
        different = {hash(tuple(words[start : start + self._size])) for start in range(num_ngrams)}
        share = 1.0 - len(different) / num_ngrams
        return RewardOutput(value=-share * self._max, details={"repeated_frac": share})

    def unit_cases(self) -> list[UnitCase]:
        twice = " ".join(["x"] * (self._size + 1))  # two equal n-grams
        return [UnitCase(completion="", expected=0.0), UnitCase(completion=twice, expected=-0.5 * self._max)]
