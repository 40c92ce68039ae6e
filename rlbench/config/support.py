"""Which tokens the policy's softmax is taken over, and what a truncated one cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlbench.config.algorithm import AlgorithmConfig
    from rlbench.config.schema import SamplingConfig

SUPPORTS = ["full", "sampler"]


def check_support(algorithm: AlgorithmConfig, sampling: SamplingConfig) -> None:
    """
    Raises:
        ValueError: algorithm.support=sampler, with sampling or a term of the loss that it does not fit.
    """
    if algorithm.support == "full":
        return
    if sampling.is_guided:
        raise ValueError(
            f"sampling.{'guided_choice' if sampling.guided_choice else 'guided_regex'} is set, but "
            "algorithm.support=sampler restricts logprobs to what top_p, top_k and min_p leave; expected no guide, or "
            "algorithm.support=full"
        )
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if getattr(sampling, name) != neutral:
            raise ValueError(
                f"sampling.{name} is {getattr(sampling, name)}, but algorithm.support=sampler restricts logprobs to "
                f"what top_p, top_k and min_p leave of the model's own softmax; expected {neutral}, or "
                "algorithm.support=full"
            )
    other = "other tokens than the policy's, so the two are not comparable; expected"
    if algorithm.kl_coef:
        raise ValueError(
            f"algorithm.kl_coef is {algorithm.kl_coef}, but with algorithm.support=sampler the reference would keep "
            f"{other} 0, or algorithm.support=full"
        )
    if algorithm.has_teacher:
        raise ValueError(
            f"algorithm.advantage is {algorithm.advantage}, but with algorithm.support=sampler the teacher would keep "
            f"{other} algorithm.support=full"
        )
    if algorithm.replay.is_on:
        raise ValueError(
            "algorithm.replay.is_on is true, but with algorithm.support=sampler what earlier policies sampled was "
            f"drawn among {other} no replay, or algorithm.support=full"
        )
