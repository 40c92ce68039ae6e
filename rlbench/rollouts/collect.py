"""Prompts become rollout groups: sampled, decoded, scored. Token in, token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlbench.engine.interface import Engine, engine_call
from rlbench.records import Completion, Prompt, Rollout, RolloutGroup, SamplingParams
from rlbench.rollouts.score import Scorer
from rlbench.rollouts.seeds import sampling_seed


def sample_completions(
    prompts: Sequence[Prompt], engine: Engine, sampling: SamplingParams, *, group_size: int, run_seed: int, step: int
) -> list[list[Completion]]:
    """`group_size` completions for each prompt; seeds are counters (see `sampling_seed`)."""
    seeds = [sampling_seed(run_seed, step, prompt.prompt_id, i) for prompt in prompts for i in range(group_size)]
    token_ids = [prompt.token_ids for prompt in prompts for _ in range(group_size)]
    with engine_call(engine, "generation"):
        flat = engine.generate(token_ids, sampling, seeds)
    return [flat[start : start + group_size] for start in range(0, len(flat), group_size)]


def make_groups(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], tokenizer: Any, scorer: Scorer, *, step: int
) -> list[RolloutGroup]:
    """Decode and score completions; decoding drops special tokens, the token ids stay as they were sampled."""
    texts = [
        [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in group]
        for group in completions
    ]
    scores = scorer.score(prompts, completions, texts)
    return [
        RolloutGroup(
            prompt=prompt,
            rollouts=tuple(
                Rollout(
                    rollout_id=f"{step}/{prompt.prompt_id}/{index}",
                    prompt=prompt,
                    completion=completion,
                    completion_text=text,
                    sample_index=index,
                    components=components,
                    reward=reward,
                )
                for index, (completion, text, components, reward) in enumerate(
                    zip(group, group_texts, group_scores, scorer.totals(group_scores), strict=True)
                )
            ),
        )
        for prompt, group, group_texts, group_scores in zip(prompts, completions, texts, scores, strict=True)
    ]
