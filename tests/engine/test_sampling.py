"""Drawing tokens: truncation sets, distribution, counter uniforms."""

import math

import pytest
import torch

from rlbench.engine.sampling import counter_uniforms, draw_tokens, truncate
from rlbench.records import SamplingParams


def kept(scores: list[float], **options) -> list[int]:
    out = truncate(torch.tensor([scores]), SamplingParams(max_tokens=1, **options))
    return [i for i, value in enumerate(out[0].tolist()) if value > -math.inf]


PROBS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]


def test_top_k_keeps_the_k_most_likely():
    assert kept(PROBS, top_k=2) == [1, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    assert kept(PROBS, top_p=0.69) == [1, 3]
    assert kept(PROBS, top_p=0.71) == [1, 3, 4]
    assert kept(PROBS, top_p=1e-6) == [1]


def test_min_p_is_relative_to_the_most_likely():
    assert kept(PROBS, min_p=0.3) == [1, 3, 4]


def test_top_p_is_taken_of_what_top_k_left():
    # Of {0.4, 0.3} the first has 0.571 of the mass.
    assert kept(PROBS, top_k=2, top_p=0.55) == [1]


def test_top_p_is_right_when_the_mass_lies_beyond_the_shortlist():
    scores = torch.zeros(1, 5000)

    out = truncate(scores, SamplingParams(max_tokens=1, top_p=0.5))

    assert int((out > -math.inf).sum()) in (2500, 2501)  # equal probabilities: rounding decides about one


def test_the_drawn_tokens_follow_the_distribution_and_report_its_logprobs():
    torch.manual_seed(0)
    logits = torch.randn(1, 13).repeat(40_000, 1)
    expected = (logits[0] / 0.7).softmax(0)

    tokens, logprobs = draw_tokens(
        logits, SamplingParams(max_tokens=1, temperature=0.7), counter_uniforms(range(40_000), 3)
    )
    counts = torch.bincount(tokens, minlength=13).float()
    chi_square = ((counts - 40_000 * expected).square() / (40_000 * expected)).sum()

    assert chi_square < 32.9  # 99.9% quantile with 12 degrees of freedom
    torch.testing.assert_close(logprobs, expected[tokens].log(), rtol=1e-4, atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])

    for uniform in (0.0, 0.4999, 0.5, 1 - 2**-53):
        token, logprob = draw_tokens(logits, SamplingParams(max_tokens=1), torch.tensor([uniform], dtype=torch.float64))
        assert int(token) in (1, 3)
        assert float(logprob) == pytest.approx(math.log(0.5))


def test_greedy_takes_the_argmax_and_reports_the_plain_softmax():
    logits = torch.tensor([[0.0, 2.0, 1.0]])

    token, logprob = draw_tokens(logits, SamplingParams(max_tokens=1, temperature=0.0), torch.zeros(1))

    assert int(token) == 1
    assert float(logprob) == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_uniforms_are_uniform_and_differ_by_seed_and_position():
    values = torch.stack([counter_uniforms(range(1000), position) for position in range(20)]).flatten()

    assert len(set(values.tolist())) == len(values)
    assert 0 <= float(values.min()) and float(values.max()) < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 43.8  # 99.9% quantile with 19 degrees of freedom


def test_blocks_of_the_vocabulary_change_nothing():
    torch.manual_seed(0)
    logits = torch.randn(200, 1000)  # seven blocks and a part
    uniforms = counter_uniforms(range(200), 0)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]

    tokens, _ = draw_tokens(logits, SamplingParams(max_tokens=1), uniforms)

    assert tokens.equal(expected)


def test_blocks_without_weight_are_never_drawn_from():
    logits = torch.full((1, 700), -math.inf)
    logits[0, [300, 301, 450]] = 0.0

    for uniform, token in ((0.0, 300), (1 / 3 + 1e-9, 301), (2 / 3 + 1e-9, 450), (1 - 2**-53, 450)):
        drawn, _ = draw_tokens(logits, SamplingParams(max_tokens=1), torch.tensor([uniform], dtype=torch.float64))
        assert int(drawn) == token
