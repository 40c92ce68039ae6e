"""Advantages of on-policy distillation: the student's own tokens, judged by a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from rlbench.algorithms.advantages import GroupReturns, TokenAdvantages


def teacher(groups: Sequence[GroupReturns], *, gamma: float) -> TokenAdvantages:
    """A_t = -sum_{k >= t} gamma^(k - t) d_k, with d_k = log student - log teacher of token k.

    With the loss -A_t logprob_t the gradient is that of the reverse KL, KL(student || teacher), in expectation over the
    student's samples: at gamma=0 of the KL of each next token with the states held fixed, at gamma=1 of the KL of whole
    completions, which also counts what a token leads to, at more variance.

    Args:
        groups: of one step, with `teacher_gaps`; rewards are not read.
        gamma: in [0, 1].

    Source: Agarwal et al. 2023, arXiv:2306.13649 (reverse KL on the student's samples); gamma=0 as in Lu and Thinking
    Machines Lab 2025, https://thinkingmachines.ai/blog/on-policy-distillation/.
    """
    return [[_discounted(gaps, gamma) for gaps in group.teacher_gaps] for group in groups]


def _discounted(gaps: Sequence[float], gamma: float) -> list[float]:
    advantages, later = [], 0.0
    for gap in reversed(gaps):
        later = -gap + gamma * later
        advantages.append(later)
    return advantages[::-1]
