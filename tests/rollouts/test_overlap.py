"""Rewards of finished completions are computed while others are generated; what comes out is the same."""

import os
import signal
import time
from dataclasses import dataclass, field

import pytest
import torch

from rlbench.config.schema import RewardsConfig
from rlbench.engine.interface import EngineDeadError
from rlbench.engine.scripted_engine import ScriptedEngine
from rlbench.records import FINISH_STOP, Prompt, SamplingParams
from rlbench.rollouts.collect import Scoring, make_groups, sample_completions
from rlbench.rollouts.score import Scorer

TEXTS = ("fine", "raise", "exit", "sleep", "nan", "print")  # what the reward `misbehave` does, by the first token
GROUP_SIZE = 4
SAMPLING = SamplingParams(max_tokens=4)
PROMPTS = [Prompt(prompt_id=f"p{i}", token_ids=(i,), text=f"prompt {i}", columns={"answer": "x"}) for i in range(3)]


@dataclass
class FirstToken:
    """A tokenizer whose text is given by the first token alone."""

    texts: tuple[str, ...]
    num_decoded: list[int] = field(default_factory=lambda: [0])

    def decode(self, token_ids, skip_special_tokens):
        assert skip_special_tokens
        self.num_decoded[0] += 1
        return self.texts[token_ids[0] % len(self.texts)]


def engine_of(seconds_per_token: float) -> ScriptedEngine:
    def logits(token_ids, adapter):
        time.sleep(seconds_per_token)
        return torch.zeros(len(token_ids), 12)

    return ScriptedEngine(logits, context=16)


def scorer_of(*names: str, **options) -> Scorer:
    components = {
        name.split(":")[0]: {
            "path": f"tests.rewards.bad_rewards.{name.split(':')[0]}",
            "batch_size": int(name.split(":")[1]) if ":" in name else 1,
        }
        for name in names
    }
    defaults = {"num_workers": 2, "timeout_s": 1.0, "allowed_prefixes": ["tests.rewards.bad_rewards."]}
    return Scorer(RewardsConfig(components=components, **{**defaults, **options}))


def collected(scorer, *, seconds_per_token=0.0, texts=("fine",), meanwhile=lambda index: None):
    """Groups, and the seconds of generation and of both together."""
    start = time.monotonic()
    scoring = Scoring(PROMPTS, FirstToken(texts), scorer, group_size=GROUP_SIZE)

    def take(index, completion):
        scoring.take(index, completion)
        meanwhile(index)

    completions = sample_completions(
        PROMPTS, engine_of(seconds_per_token), SAMPLING, group_size=GROUP_SIZE, run_seed=1, step=1, on_finished=take
    )
    generation_s = time.monotonic() - start
    return make_groups(completions, scoring, step=1), generation_s, time.monotonic() - start


def test_a_slow_reward_is_hidden_behind_a_slow_engine():
    with_overlap, without = scorer_of("slow", num_workers=1), scorer_of("slow", num_workers=1, overlap=False)
    groups, generation_s, total_s = collected(with_overlap, seconds_per_token=0.02)
    expected, sequential_generation_s, sequential_s = collected(without, seconds_per_token=0.02)
    hidden_s = with_overlap.metrics()["reward_pool/overlapped_s"]
    nothing = without.metrics()["reward_pool/overlapped_s"]
    for scorer in (with_overlap, without):
        scorer.close()

    reward_s = 0.05 * len(PROMPTS) * GROUP_SIZE
    assert groups == expected
    assert sequential_s - sequential_generation_s >= reward_s > 2 * (total_s - generation_s)
    assert reward_s / 2 < hidden_s < generation_s and nothing == 0.0


@pytest.mark.parametrize("retries", [0, 1])
def test_errors_timeouts_and_deaths_are_what_they_are_without_overlap(retries):
    options = {"num_workers": 1, "timeout_s": 0.5, "max_retries": retries}  # one: samples are quarantined in order
    scorers = [scorer_of("misbehave", "length", overlap=overlap, **options) for overlap in (True, False)]
    found, expected = (collected(scorer, texts=TEXTS)[0] for scorer in scorers)
    counts = [scorer.metrics() for scorer in scorers]
    for scorer in scorers:
        scorer.close()

    statuses = {r.components["misbehave"].status for group in found for r in group.rollouts}
    assert found == expected and statuses == {"value", "error", "timeout"}
    assert {r.reward is None for group in found for r in group.rollouts} == {True, False}
    for name in ("num_value", "num_error", "num_timeout", "num_quarantined"):
        assert counts[0][f"reward_pool/{name}"] == counts[1][f"reward_pool/{name}"]


def test_a_batched_reward_gets_the_same_batches_and_waits_for_all_of_each():
    scorers = [scorer_of("trl_batch_size:5", "Batched:12", "slow", overlap=overlap) for overlap in (True, False)]
    found, expected = (collected(scorer)[0] for scorer in scorers)
    for scorer in scorers:
        scorer.close()

    assert found == expected
    sizes = [r.components["trl_batch_size"].value for group in found for r in group.rollouts]
    assert sizes == [5.0] * 10 + [2.0] * 2
    assert {r.components["Batched"].value for group in found for r in group.rollouts} == {12.0}


def test_a_full_queue_does_not_hold_the_engine_up():
    scorer = scorer_of("slower", num_workers=1, max_pending=1)
    groups, generation_s, total_s = collected(scorer)
    scorer.close()

    assert generation_s < 0.9 and total_s > 0.15 * 12
    assert all(r.reward == 1.0 for group in groups for r in group.rollouts)


def test_a_worker_killed_while_the_engine_generates_costs_no_reward():
    scorer = scorer_of("slow", timeout_s=5.0)
    pool = scorer._pool
    assert pool is not None

    def kill(index):
        if index == 5:
            os.kill(pool.pids()[0], signal.SIGKILL)

    groups, _, _ = collected(scorer, seconds_per_token=0.01, meanwhile=kill)
    counts = scorer.metrics()
    scorer.close()

    assert all(r.reward == 1.0 for group in groups for r in group.rollouts)
    assert counts["reward_pool/num_restarts"] == 1


def test_a_pool_that_ends_while_the_engine_generates_is_an_error_of_scoring_not_of_the_engine():
    scorer = scorer_of("slow")
    scoring = Scoring(PROMPTS, FirstToken(("fine",)), scorer, group_size=GROUP_SIZE)

    def take(index, completion):
        if index == 3:
            scorer.close()
        scoring.take(index, completion)

    completions = sample_completions(
        PROMPTS, engine_of(0.0), SAMPLING, group_size=GROUP_SIZE, run_seed=1, step=1, on_finished=take
    )

    assert len(completions) == len(PROMPTS)
    with pytest.raises(RuntimeError, match="closed|replaced"):
        make_groups(completions, scoring, step=1)


def test_each_completion_is_decoded_once():
    scorer, tokenizer = scorer_of("length"), FirstToken(("fine", "raise"))
    scoring = Scoring(PROMPTS, tokenizer, scorer, group_size=GROUP_SIZE)
    sampling = SamplingParams(max_tokens=4, stop_token_ids=tuple(range(6)))
    completions = sample_completions(
        PROMPTS, engine_of(0.0), sampling, group_size=GROUP_SIZE, run_seed=1, step=1, on_finished=scoring.take
    )
    groups = make_groups(completions, scoring, step=1)
    scorer.close()

    assert tokenizer.num_decoded[0] == len(PROMPTS) * GROUP_SIZE
    assert {r.completion.finish_reason for group in groups for r in group.rollouts} > {FINISH_STOP}
    for group, prompt in zip(groups, PROMPTS, strict=True):
        assert group.prompt == prompt
        assert [r.components["length"].value for r in group.rollouts] == [
            float(len(r.completion_text)) for r in group.rollouts
        ]


def test_an_error_of_scoring_is_not_the_engines():
    def fails(index, completion):
        raise RuntimeError("the pool is gone")

    with pytest.raises(RuntimeError, match="the pool is gone"):
        sample_completions(PROMPTS, engine_of(0.0), SAMPLING, group_size=2, run_seed=0, step=1, on_finished=fails)


def test_an_error_of_the_engine_is_named():
    def broken(token_ids, adapter):
        raise RuntimeError("illegal memory access")

    with pytest.raises(EngineDeadError, match="engine=scripted failed in generation: RuntimeError: illegal memory"):
        sample_completions(PROMPTS, ScriptedEngine(broken, context=32), SAMPLING, group_size=2, run_seed=0, step=1)
