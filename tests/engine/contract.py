"""What every engine must do, as functions `check(subject)`; `test_contract.py` runs them for each engine.

How engines take over an adapter: `contract_adapter.py`.

The checks compare with an independent recomputation: `Subject.logits` gives the next-token logits of a plain forward
of the whole sequence, `distribution` does temperature and truncation once more in float64, straight from the
definitions. An engine may already hold an adapter from an earlier check: the subject remembers which, and the
recomputation uses the same one, so that the checks can run in any order.

Shapes: L sequence length, V vocabulary, R rank.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rlbench.engine.interface import Adapter, Engine
from rlbench.records import FINISH_LENGTH, FINISH_STOP, Completion, SamplingParams

NATS = 1e-3  # float32 engines against a float32 transformers forward; measured below 2e-5
CHI_SQUARE_QUANTILE = 4.0  # standard deviations of the chi-square's normal approximation: one false alarm in 30,000

SAMPLINGS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.6),
    SamplingParams(max_tokens=12, temperature=1.7),
    SamplingParams(max_tokens=12, top_k=5),
    SamplingParams(max_tokens=12, top_p=0.7),
    SamplingParams(max_tokens=12, min_p=0.15),
    SamplingParams(max_tokens=12, temperature=0.8, min_p=0.02, top_k=20, top_p=0.9),
    SamplingParams(max_tokens=12, temperature=0.0),
    SamplingParams(max_tokens=12, repetition_penalty=1.4),
    SamplingParams(max_tokens=12, presence_penalty=1.5, frequency_penalty=-0.5),
    SamplingParams(max_tokens=12, temperature=0.7, top_k=8, repetition_penalty=0.5, frequency_penalty=1.5),
    SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=2.0, presence_penalty=1.0),
]
# Around the block size of paged caches, single tokens, repeats, and an id sequence that no tokenizer would produce.
PROMPTS: list[list[int]] = [
    [7],
    [3, 3, 3, 3],
    [(5 * i) % 90 + 2 for i in range(31)],
    [(5 * i) % 90 + 2 for i in range(32)],
    [(5 * i) % 90 + 2 for i in range(33)],
    [(11 * i) % 90 + 2 for i in range(70)],
    [3, 3, 3, 3],
]


@dataclass
class Subject:
    """An engine under test with the model that it must agree with.

    `logits(token_ids, adapter)` returns float32 [L, V]: row i predicts the token after token_ids[i].
    """

    engine: Engine
    logits: Callable[[Sequence[int], Adapter | None], Tensor]
    make_adapter: Callable[[int], Adapter]  # a non-zero adapter of that random seed, on every linear layer
    context: int  # tokens
    tokenizer: Any
    adapter: Adapter | None = field(default=None)  # a copy of what the engine holds

    def sync(self, adapter: Adapter) -> int:
        """Give the adapter to the engine under the next version; returns the version."""
        version = self.engine.policy_version + 1
        self.adapter = copy.deepcopy(adapter)
        self.engine.sync(adapter, version)
        return version

    def next_logits(self, prompt: Sequence[int], completion: Sequence[int], *, use_adapter: bool = True) -> Tensor:
        """[len(completion), V]: the logits that predict each completion token."""
        sequence = [*prompt, *completion]
        return self.logits(sequence, self.adapter if use_adapter else None)[len(prompt) - 1 : len(sequence) - 1]

    def scores(self, prompt: Sequence[int], completion: Sequence[int], *, use_adapter: bool = True) -> list[float]:
        rows = self.next_logits(prompt, completion, use_adapter=use_adapter).double().log_softmax(-1)
        return [float(row[token]) for row, token in zip(rows, completion, strict=True)]


def distribution(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """float64 [V] probabilities of one row [V]: softmax(logits / temperature), then min_p, top_k, top_p in that order.

    Each truncation renormalises before the next. Temperature 0 returns the plain softmax.
    """
    if sampling.temperature == 0:
        return logits.double().softmax(-1)
    probs = (logits.double() / sampling.temperature).softmax(-1)
    probs = torch.where(probs >= sampling.min_p * probs.max(), probs, 0.0)
    order = probs.argsort(descending=True)
    if sampling.top_k > 0:
        probs[order[sampling.top_k :]] = 0.0
    probs = probs / probs.sum()
    mass_before = probs[order].cumsum(-1) - probs[order]
    if sampling.top_p < 1:
        probs[order[mass_before >= sampling.top_p]] = 0.0
    return probs / probs.sum()


def penalised(logits: Tensor, sampling: SamplingParams, prompt: Sequence[int], prefix: Sequence[int]) -> Tensor:
    """float64 [V]: one row of logits after the penalties for what prompt and completion so far hold, token by token."""
    out = logits.double().clone()
    for token in {*prompt, *prefix}:
        out[token] *= sampling.repetition_penalty ** (-1 if out[token] > 0 else 1)
    for token in set(prefix):
        out[token] -= sampling.frequency_penalty * list(prefix).count(token) + sampling.presence_penalty
    return out


def sample(
    subject: Subject, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int] | None = None
) -> list[Completion]:
    return subject.engine.generate(prompts, sampling, seeds or range(100, 100 + len(prompts)))


def assert_logprobs_match(subject: Subject, prompt: Sequence[int], completion: Completion, sampling: SamplingParams):
    rows = subject.next_logits(prompt, completion.token_ids)
    expected = []
    for i, (row, token) in enumerate(zip(rows, completion.token_ids, strict=True)):
        row = penalised(row, sampling, prompt, completion.token_ids[:i])
        expected.append(math.log(float(distribution(row, sampling)[token])))
    assert completion.sampling_logprobs == pytest.approx(expected, abs=NATS)
    plain = (rows.double() / (sampling.temperature or 1.0)).log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(plain, completion.token_ids, strict=True)]
    assert completion.engine_logprobs == pytest.approx(expected, abs=NATS)


def sampling_logprobs_equal_a_plain_forward(subject: Subject):
    # Proves token in, token out too: another tokenisation of prompt or completion would not give these numbers.
    for sampling in SAMPLINGS:
        completions = sample(subject, PROMPTS, sampling)
        assert len(completions) == len(PROMPTS)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            assert_logprobs_match(subject, prompt, completion, sampling)


def completions_carry_seed_version_and_fingerprint(subject: Subject):
    seeds = [5, 2**63 - 1]

    for completion, seed in zip(sample(subject, PROMPTS[:2], SAMPLINGS[0], seeds), seeds, strict=True):
        assert completion.seed == seed
        assert completion.policy_version == subject.engine.policy_version
        assert completion.adapter_fingerprint == subject.engine.adapter_fingerprint
        assert all(type(token) is int for token in completion.token_ids)
        assert all(type(logprob) is float for logprob in completion.sampling_logprobs)


def penalties_change_which_tokens_are_greedy(subject: Subject):
    plain = sample(subject, PROMPTS, SamplingParams(max_tokens=16, temperature=0.0))
    sampling = SamplingParams(max_tokens=16, temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0)

    for prompt, completion in zip(PROMPTS, sample(subject, PROMPTS, sampling), strict=True):
        rows = subject.next_logits(prompt, completion.token_ids)
        for i, (row, token) in enumerate(zip(rows, completion.token_ids, strict=True)):
            assert int(penalised(row, sampling, prompt, completion.token_ids[:i]).argmax()) == token
    found = sample(subject, PROMPTS, sampling)
    assert [c.token_ids for c in found] != [c.token_ids for c in plain], "the penalties changed nothing"


def greedy_takes_the_argmax(subject: Subject):
    sampling = SamplingParams(max_tokens=16, temperature=0.0)

    for prompt, completion in zip(PROMPTS, sample(subject, PROMPTS, sampling), strict=True):
        assert list(completion.token_ids) == subject.next_logits(prompt, completion.token_ids).argmax(-1).tolist()


def top_k_of_one_equals_greedy(subject: Subject):
    greedy = sample(subject, PROMPTS, SamplingParams(max_tokens=16, temperature=0.0))
    top_1 = sample(subject, PROMPTS, SamplingParams(max_tokens=16, temperature=1.3, top_k=1))

    assert [c.token_ids for c in top_1] == [c.token_ids for c in greedy]
    assert all(logprob == pytest.approx(0.0, abs=NATS) for c in top_1 for logprob in c.sampling_logprobs)


def a_stop_token_ends_the_completion_and_is_its_last(subject: Subject):
    free = sample(subject, PROMPTS, SamplingParams(max_tokens=24))
    stop = free[0].token_ids[5]

    stopped = sample(subject, PROMPTS, SamplingParams(max_tokens=24, stop_token_ids=(stop,)))

    for before, after in zip(free, stopped, strict=True):
        end = before.token_ids.index(stop) + 1 if stop in before.token_ids else 24
        assert after.token_ids == before.token_ids[:end]
        assert after.finish_reason == (FINISH_STOP if stop in before.token_ids else FINISH_LENGTH)
        assert after.sampling_logprobs == pytest.approx(before.sampling_logprobs[:end], abs=NATS)


def a_stop_string_ends_the_completion_at_the_token_that_completes_it(subject: Subject):
    free = sample(subject, PROMPTS, SamplingParams(max_tokens=24))
    texts = [subject.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in free]
    stop = (texts[0][4:7], texts[3][9:10])

    stopped = sample(subject, PROMPTS, SamplingParams(max_tokens=24, stop=stop))

    num_ended = 0
    for before, after in zip(free, stopped, strict=True):
        prefixes = [subject.tokenizer.decode(before.token_ids[:n], skip_special_tokens=True) for n in range(1, 25)]
        ends = [n for n, text in enumerate(prefixes, start=1) if any(s in text for s in stop)]
        num_ended += bool(ends)
        assert after.token_ids == before.token_ids[: ends[0] if ends else 24]
        assert after.finish_reason == (FINISH_STOP if ends else FINISH_LENGTH)
        assert after.sampling_logprobs == pytest.approx(before.sampling_logprobs[: len(after.token_ids)], abs=NATS)
    assert 2 <= num_ended < len(PROMPTS), "the strings end all or next to nothing: this test means little"


def a_stop_string_is_not_looked_for_in_the_prompt(subject: Subject):
    prompt = PROMPTS[2]
    (free,) = sample(subject, [prompt], SamplingParams(max_tokens=24))
    text = subject.tokenizer.decode(free.token_ids, skip_special_tokens=True)
    stop = next(s for s in (subject.tokenizer.decode(prompt[i : i + 2]) for i in range(30)) if s and s not in text)
    across = subject.tokenizer.decode([prompt[-1], free.token_ids[0]])  # begins in the prompt

    (found,) = sample(subject, [prompt], SamplingParams(max_tokens=24, stop=(stop, across)))

    assert across not in text
    assert found.token_ids == free.token_ids


def only_the_given_stop_tokens_stop(subject: Subject):
    # The tiny models' config names an end-of-sequence token, id 1: with no stop tokens given it must not end anything.
    sampling = SamplingParams(max_tokens=50, temperature=2.0)
    seeds = list(range(40))

    completions = sample(subject, [[5]] * 40, sampling, seeds)

    assert any(1 in c.token_ids[:-1] for c in completions), "too few tokens drawn for this test to mean anything"
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(50, FINISH_LENGTH)}


def the_length_limit_is_exact(subject: Subject):
    full = subject.context - len(PROMPTS[3])
    for max_tokens in (1, 2, 17, full):
        (completion,) = sample(subject, [PROMPTS[3]], SamplingParams(max_tokens=max_tokens))
        assert (len(completion.token_ids), completion.finish_reason) == (max_tokens, FINISH_LENGTH)
    assert_logprobs_match(subject, PROMPTS[3], completion, SamplingParams(max_tokens=full))


def truncation_draws_all_of_the_kept_set_and_nothing_else(subject: Subject):
    prompt = PROMPTS[1]
    (logits,) = subject.next_logits(prompt, [0])
    for sampling in (
        SamplingParams(max_tokens=1, top_k=3),
        SamplingParams(max_tokens=1, top_p=0.4),
        SamplingParams(max_tokens=1, min_p=0.3),
        SamplingParams(max_tokens=1, temperature=1.5, min_p=0.1, top_k=8, top_p=0.8),
    ):
        probs = distribution(logits, sampling)
        drawn = {c.token_ids[0] for c in sample(subject, [prompt] * 300, sampling, range(300))}
        assert drawn <= set(probs.nonzero().flatten().tolist())
        assert drawn >= set((probs > 0.05).nonzero().flatten().tolist())


def a_sample_depends_on_its_seed_not_on_the_batch(subject: Subject):
    if not getattr(subject.engine, "is_batch_invariant", True):
        pytest.skip("the engine says that its batches are not independent (is_batch_invariant)")
    prompts, sampling = PROMPTS * 3, SamplingParams(max_tokens=20, temperature=1.2)
    seeds = [1000 + i for i in range(len(prompts))]
    expected = [c.token_ids for c in sample(subject, prompts, sampling, seeds)]
    order = random.Random(0).sample(range(len(prompts)), len(prompts))

    shuffled = sample(subject, [prompts[i] for i in order], sampling, [seeds[i] for i in order])
    alone = [sample(subject, [prompts[i]], sampling, [seeds[i]])[0] for i in (0, 5, 9)]
    again = sample(subject, prompts, sampling, seeds)

    assert [c.token_ids for c in shuffled] == [expected[i] for i in order]
    assert [c.token_ids for c in alone] == [expected[i] for i in (0, 5, 9)]
    assert [c.token_ids for c in again] == expected


def different_seeds_give_different_samples(subject: Subject):
    seeds = [0, 1, 2, 1 << 32, 1 << 40, 1 << 62, (1 << 62) + 1, 2**63 - 1]

    completions = sample(subject, [PROMPTS[2]] * len(seeds), SamplingParams(max_tokens=20), seeds)

    assert len({c.token_ids for c in completions}) == len(seeds)


def first_tokens_over_seeds_fit_the_softmax(subject: Subject):
    num_seeds, prompt, sampling = 3000, PROMPTS[1], SamplingParams(max_tokens=1, temperature=0.9)
    (logits,) = subject.next_logits(prompt, [0])
    probs = distribution(logits, sampling)

    completions = sample(subject, [prompt] * num_seeds, sampling, range(num_seeds))

    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(probs)).double()
    is_large = probs * num_seeds >= 8
    expected = torch.cat([probs[is_large], probs[~is_large].sum()[None]]) * num_seeds
    observed = torch.cat([counts[is_large], counts[~is_large].sum()[None]])
    chi_square = float(((observed - expected).square() / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    assert freedom >= 5, "too few likely tokens for this test to mean anything"
    assert chi_square < freedom + CHI_SQUARE_QUANTILE * math.sqrt(2 * freedom)


def each_completion_is_handed_out_as_soon_as_it_is_finished(subject: Subject):
    prompts, seeds = PROMPTS * 3, range(40, 61)  # more than the engines decode together
    sampling = SamplingParams(max_tokens=40, stop_token_ids=tuple(range(2, 60)))
    expected = subject.engine.generate(prompts, sampling, seeds)
    found: list[tuple[int, Completion]] = []

    completions = subject.engine.generate(prompts, sampling, seeds, lambda *one: found.append(one))

    assert completions == expected == [completion for _, completion in sorted(found, key=lambda one: one[0])]
    assert len({len(completion.token_ids) for completion in completions}) > 3
    is_in_order_of_the_prompts = [index for index, _ in found] == list(range(len(prompts)))
    assert is_in_order_of_the_prompts == (subject.engine.name == "scripted")  # which draws one sample after the other


def what_is_raised_at_a_finished_completion_ends_the_call_and_nothing_else(subject: Subject):
    sampling = SamplingParams(max_tokens=30, stop_token_ids=tuple(range(2, 60)))
    expected = sample(subject, PROMPTS, sampling)

    def fail(index: int, completion: Completion) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        subject.engine.generate(PROMPTS, sampling, range(100, 100 + len(PROMPTS)), fail)

    assert sample(subject, PROMPTS, sampling) == expected
    subject.sync(subject.make_adapter(16))  # no request of the call is left in the engine


def the_callers_random_stream_is_untouched(subject: Subject):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    sample(subject, PROMPTS, SAMPLINGS[0])
    subject.engine.score([PROMPTS[0]], [[4]])

    assert torch.equal(torch.rand(4), expected)


def score_equals_a_plain_forward(subject: Subject):
    completions = [[(7 * i + j) % 90 + 2 for j in range(1 + 5 * i)] for i in range(len(PROMPTS))]
    completions[4] = [5] * (subject.context - len(PROMPTS[4]))  # fills the context

    scores = subject.engine.score(PROMPTS, completions)

    for prompt, completion, found in zip(PROMPTS, completions, scores, strict=True):
        assert found == pytest.approx(subject.scores(prompt, completion), abs=NATS)


def sleep_and_wake_change_no_result(subject: Subject):
    subject.sync(subject.make_adapter(14))
    before = sample(subject, PROMPTS, SAMPLINGS[0]), subject.engine.score(PROMPTS, [[5, 6]] * len(PROMPTS))

    for _ in range(3):
        subject.engine.sleep()
        subject.engine.sleep()  # twice is once
        subject.engine.wake()
    after = sample(subject, PROMPTS, SAMPLINGS[0]), subject.engine.score(PROMPTS, [[5, 6]] * len(PROMPTS))

    assert [c.token_ids for c in after[0]] == [c.token_ids for c in before[0]]
    for found, expected in zip(after[1], before[1], strict=True):
        assert found == pytest.approx(expected, abs=NATS)


def generate_and_score_and_sync_work_on_a_sleeping_engine(subject: Subject):
    subject.engine.sleep()
    for prompt, completion in zip(PROMPTS, sample(subject, PROMPTS, SAMPLINGS[0]), strict=True):
        assert_logprobs_match(subject, prompt, completion, SAMPLINGS[0])

    subject.engine.sleep()
    subject.sync(subject.make_adapter(15))
    (found,) = subject.engine.score([PROMPTS[2]], [[5, 6, 7]])

    assert found == pytest.approx(subject.scores(PROMPTS[2], [5, 6, 7]), abs=NATS)


def wrong_requests_are_refused_with_a_sentence(subject: Subject):
    one, long = SamplingParams(max_tokens=1), [3] * subject.context
    generate, score = subject.engine.generate, subject.engine.score

    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate([[3], []], one, [1, 2])
    with pytest.raises(ValueError, match="2 prompts, but 1 "):
        generate([[3], [4]], one, [1])
    with pytest.raises(ValueError, match=f"prompt 0 has {subject.context} tokens.*context of {subject.context}"):
        generate([long], one, [1])
    with pytest.raises(ValueError, match="context"):
        generate([[3]], SamplingParams(max_tokens=subject.context), [1])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        score([[]], [[3]])
    with pytest.raises(ValueError, match="2 prompts, but 1 "):
        score([[3], [4]], [[3]])
    with pytest.raises(ValueError, match="context"):
        score([long], [[3]])


def no_prompts_give_no_completions(subject: Subject):
    assert subject.engine.generate([], SamplingParams(max_tokens=1), []) == []
    assert subject.engine.score([], []) == []


CHECKS: list[Callable[[Subject], None]] = [
    sampling_logprobs_equal_a_plain_forward,
    completions_carry_seed_version_and_fingerprint,
    greedy_takes_the_argmax,
    penalties_change_which_tokens_are_greedy,
    top_k_of_one_equals_greedy,
    a_stop_token_ends_the_completion_and_is_its_last,
    a_stop_string_ends_the_completion_at_the_token_that_completes_it,
    a_stop_string_is_not_looked_for_in_the_prompt,
    only_the_given_stop_tokens_stop,
    the_length_limit_is_exact,
    truncation_draws_all_of_the_kept_set_and_nothing_else,
    a_sample_depends_on_its_seed_not_on_the_batch,
    different_seeds_give_different_samples,
    first_tokens_over_seeds_fit_the_softmax,
    each_completion_is_handed_out_as_soon_as_it_is_finished,
    what_is_raised_at_a_finished_completion_ends_the_call_and_nothing_else,
    the_callers_random_stream_is_untouched,
    score_equals_a_plain_forward,
    sleep_and_wake_change_no_result,
    generate_and_score_and_sync_work_on_a_sleeping_engine,
    wrong_requests_are_refused_with_a_sentence,
    no_prompts_give_no_completions,
]
