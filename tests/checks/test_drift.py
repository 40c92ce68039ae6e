"""The drift gauge: hand-computed numbers, laws, like with like under truncation, and the ladder."""

import math

import pytest
import torch

from rlbench.checks.drift import CORRECT, OK, STOP, WARN, Drift, decide, measure_batch, measure_drift, position_curve
from rlbench.config.schema import ChecksConfig, LoraConfig
from rlbench.data.packing import pack
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams, TrainingSample
from rlbench.weight_sync import sync
from rlbench_kernels import linear_logprobs
from tests.models.test_lora import randomise

CONFIG = ChecksConfig(drift_warn_nats=0.1, drift_stop_nats=0.5)


def drift(ratios: list[float]) -> Drift:
    engine = torch.tensor([-1.0 - 0.1 * i for i in range(len(ratios))])
    return measure_drift(engine + torch.tensor(ratios).log(), engine, torch.arange(len(ratios)), max_ratio=2.0)


def test_hand_computed_ratios():
    found = drift([4.0, 1.0, 0.5, 0.5])

    assert found.ess_frac == pytest.approx(6.0**2 / (16 + 1 + 0.25 + 0.25) / 4, rel=1e-5)
    expected = {
        "drift/logprob_gap_mean": (math.log(4) + 2 * math.log(2)) / 4,
        "drift/logprob_gap_max": math.log(4),
        "drift/ratio_mean": 1.5,
        "drift/ratio_max": 4.0,
        "drift/truncated_ratio_mean": 1.0,
        "drift/truncated_frac": 0.25,
        "drift/kl": 1.5 - 1 - (math.log(4) - 2 * math.log(2)) / 4,
    }
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-5), name


def test_equal_policies_have_no_drift():
    found = drift([1.0] * 50)

    assert found.gap_mean == 0 and found.ess_frac == pytest.approx(1)
    assert found.metrics["drift/kl"] == 0 and found.metrics["drift/truncated_frac"] == 0


def test_one_token_with_all_the_weight_leaves_one_effective_sample():
    assert drift([1e6, *[1e-6] * 99]).ess_frac == pytest.approx(0.01, rel=1e-3)


def test_the_curve_has_bins_of_doubling_length():
    values = torch.arange(70.0)

    assert position_curve(values, torch.arange(70)) == [(0, 7.5), (16, 23.5), (32, 47.5), (64, 66.5)]
    assert position_curve(torch.tensor([1.0, 3.0]), torch.tensor([40, 41])) == [(32, 2.0)]


@pytest.mark.parametrize(
    ("gap_mean", "ess_frac", "level", "key"),
    [
        (0.05, 0.99, OK, ""),
        (0.2, 0.99, WARN, "checks.drift_warn_nats of 0.1"),
        (0.05, 0.9, CORRECT, "checks.drift_correct_ess_frac of 0.98"),
        (0.2, 0.9, CORRECT, "checks.drift_correct_ess_frac"),
        (0.6, 0.99, STOP, "checks.drift_stop_nats of 0.5"),
        (0.05, 0.4, STOP, "checks.drift_stop_ess_frac of 0.5"),
        (math.nan, 0.99, STOP, "checks.drift_stop_nats"),
        (0.05, math.nan, STOP, "checks.drift_stop_ess_frac"),
    ],
)
def test_the_ladder_takes_the_highest_level_and_names_the_setting(gap_mean, ess_frac, level, key):
    decision = decide(Drift(gap_mean=gap_mean, ess_frac=ess_frac, metrics={}), CONFIG)

    assert decision.level == level
    assert key in decision.reason


SAMPLINGS = [
    SamplingParams(max_tokens=40, temperature=0.7),
    SamplingParams(max_tokens=40, temperature=0.7, top_p=0.6),
    SamplingParams(max_tokens=40, top_k=3, min_p=0.05),
    SamplingParams(max_tokens=40, temperature=1.3, repetition_penalty=1.5, presence_penalty=1.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_truncation_and_penalties_are_no_drift(tiny_base, sampling):
    policy, engine = Policy(tiny_base, LoraConfig(rank=4), seed=0), HfEngine(tiny_base)
    randomise(policy.model)
    sync(policy.adapter(), engine, 1)
    prompts = [(5, 6, 7), (8, 9)]
    completions = engine.generate([p for p in prompts for _ in range(3)], sampling, list(range(6)))
    samples = [
        TrainingSample(
            group_id=str(i // 3),
            prompt_token_ids=prompts[i // 3],
            token_ids=c.token_ids,
            sampling_logprobs=c.sampling_logprobs,
            plain_logprobs=c.plain_logprobs,
            advantages=(1.0,) * 40,
            loss_mask=(True,) * 30 + (False,) * 10,
        )
        for i, c in enumerate(completions)
    ]
    microbatches = pack(samples, tokens_per_microbatch=100, device="cpu")
    assert len(microbatches) > 1
    with torch.no_grad():
        logprobs = [
            linear_logprobs(policy.hidden(m), policy.head_weight, m.targets, temperature=sampling.temperature)[0]
            for m in microbatches
        ]

    found = measure_batch(microbatches, logprobs, max_ratio=2.0)

    assert found is not None and found.metrics["drift/logprob_gap_max"] < 1e-3
    assert set(k for k in found.metrics if "from" in k) == {f"drift/logprob_gap_from_{n}" for n in (0, 16)}
    drawn_with = torch.cat([m.sampling_logprobs for m in microbatches])
    is_plain = torch.equal(drawn_with, torch.cat([m.engine_logprobs for m in microbatches]))
    assert is_plain == (sampling == SAMPLINGS[0])


def test_a_batch_without_loss_tokens_has_no_drift():
    sample = TrainingSample(
        group_id="0",
        prompt_token_ids=(1,),
        token_ids=(2, 3),
        sampling_logprobs=(0.0, 0.0),
        advantages=(0.0, 0.0),
        loss_mask=(False, False),
    )
    microbatches = pack([sample], tokens_per_microbatch=9, device="cpu")

    assert measure_batch(microbatches, [torch.zeros(2)], max_ratio=2.0) is None
    assert measure_batch([], [], max_ratio=2.0) is None
