"""algorithm.support=sampler: the update on the softmax that was drawn from, against float64 with an explicit mask."""

import copy
import dataclasses
import math

import pytest
import torch

from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.checks.drift import measure_batch
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.records import SamplingParams, TrainingSample
from rlbench.training.support import outside_mass, sampler_support, support_floor
from rlbench.training.update import make_minibatches, update_policy
from rlbench.weight_sync import sync
from rlbench_kernels import linear_logprobs
from tests.models.test_lora import gradients, randomise
from tests.training.test_step import make_policy
from tests.training.test_update import Capture, assert_same

LENGTH = 6
TRUNCATIONS = [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"min_p": 0.05, "top_k": 9, "top_p": 0.8}]


def drawn(base, policy, sampling: SamplingParams) -> list[TrainingSample]:
    engine = HfEngine(base)
    sync(policy.adapter(), engine, 1)
    prompts = [(5, 6, 7), (8, 9)]
    completions = engine.generate([p for p in prompts for _ in range(3)], sampling, list(range(6)))
    return [
        TrainingSample(
            group_id=str(i // 3),
            prompt_token_ids=prompts[i // 3],
            token_ids=c.token_ids,
            sampling_logprobs=c.sampling_logprobs,
            plain_logprobs=c.plain_logprobs,
            advantages=((-1.0, 0.5, 2.0)[i % 3],) * LENGTH,
            loss_mask=(True,) * (LENGTH - 1) + (False,),
        )
        for i, c in enumerate(completions)
    ]


def update(policy, samples, sampler, *, lr=0.0, temperature=0.7, **options):
    config = AlgorithmConfig(**options)
    optimizer = Capture(policy, lr)
    parts = make_minibatches(samples, config, tokens_per_microbatch=20, max_completion_tokens=LENGTH, device="cpu")
    result = update_policy(
        policy, parts, optimizer, config, temperature=temperature, max_grad_norm=0,
        entropy_control=EntropyControl(coef=config.entropy_coef), seed=3, sampler=sampler,
    )  # fmt: skip
    assert result.is_finite
    return optimizer.captured, result


def masked_logprobs(model, sample: TrainingSample, sampling: SamplingParams) -> torch.Tensor:
    """float64 [LENGTH]: softmax over the tokens that an explicit mask of min_p, top_k, top_p keeps, the target too."""
    ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])
    start, targets = len(sample.prompt_token_ids) - 1, torch.tensor(sample.token_ids)
    scores = model(input_ids=ids).logits[0, start : start + LENGTH] / sampling.temperature
    with torch.no_grad():
        probs = scores.softmax(-1)
        is_inside = probs >= sampling.min_p * probs.amax(-1, keepdim=True)
        order = scores.argsort(-1, descending=True)
        rank = order.argsort(-1)
        if sampling.top_k:
            is_inside &= rank < sampling.top_k
        left = (probs * is_inside).gather(-1, order)
        left = left / left.sum(-1, keepdim=True)
        is_inside &= (left.cumsum(-1) - left < sampling.top_p).gather(-1, rank)
        is_inside.scatter_(1, targets[:, None], True)
    return scores.masked_fill(~is_inside, -math.inf).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("loss", ["clipped_surrogate", "gspo"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_first_update_has_the_gradient_of_the_masked_softmax(tiny_base, truncation, loss):
    policy = make_policy(tiny_base)
    sampling = SamplingParams(max_tokens=LENGTH, temperature=0.7, **truncation)
    samples = drawn(tiny_base, policy, sampling)

    (ours,), result = update(policy, samples, sampling, loss=loss, importance="off", normalization="sequence_mean")

    model = add_lora(share_base(copy.deepcopy(tiny_base)), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    model.double()
    count = LENGTH - 1
    objective = torch.zeros((), dtype=torch.float64)
    for sample in samples:  # on-policy, every ratio is 1: the gradient is that of sum_t A_t logprob_t
        logprobs = masked_logprobs(model, sample, sampling)
        objective = objective - (logprobs * torch.tensor(sample.advantages))[:count].sum() / count / len(samples)
    objective.backward()
    assert_same(ours, {name: grad.float() for name, grad in gradients(model).items()})
    drift = measure_batch(result.microbatches, result.logprobs, max_ratio=2.0, is_truncated=True)
    assert drift is not None and drift.metrics["drift/logprob_gap_max"] < 1e-4
    of_full = measure_batch(result.microbatches, result.logprobs, max_ratio=2.0)
    assert of_full is not None and of_full.gap_mean > 0.05


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_several_updates_begin_on_the_set_of_the_first_and_stay_finite(tiny_base, truncation):
    sampling = SamplingParams(max_tokens=LENGTH, temperature=0.7, **truncation)
    policy = make_policy(tiny_base)
    samples = drawn(tiny_base, policy, sampling)
    (once,), _ = update(make_policy(tiny_base), samples, sampling)

    captured, result = update(policy, samples, sampling, lr=0.05, num_updates=3)

    assert_same(captured[0], once, rtol=1e-4)
    assert result.num_applied == 3 and result.metrics["policy/kl_to_old"] > 1e-6
    drift = measure_batch(result.microbatches, result.logprobs, max_ratio=2.0, is_truncated=True)
    assert drift is not None and drift.metrics["drift/logprob_gap_max"] < 1e-4


def test_the_kept_set_does_not_move_with_a_common_shift_of_the_logits_nor_with_the_policys_own_truncation():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(40, 16, generator=generator)
    weight[:, 0] = 1.0
    targets = torch.randint(0, 40, (50,), generator=generator)
    sampling = SamplingParams(max_tokens=1, temperature=0.7, top_k=5)
    floor = support_floor(hidden, weight, targets, sampling)

    def num_inside(hidden):
        support = sampler_support(hidden, weight, targets, sampling, floor)
        return ((hidden @ weight.T) / 0.7 >= support[:, None]).sum(-1)

    shifted = hidden + 3.0 * torch.eye(16)[0]  # every logit of a row rises by 3
    assert (num_inside(hidden) == 5).all() and (num_inside(shifted) == 5).all()
    flatter = num_inside(0.2 * hidden)
    assert (flatter > 5).any()  # tokens that rose above the floor entered; the policy's own top_k would keep 5


def test_a_drawn_token_outside_of_the_set_counts_as_inside():
    hidden, weight = torch.ones(1, 1), torch.tensor([[5.0], [4.0], [0.0]])
    targets = torch.tensor([2])
    sampling = SamplingParams(max_tokens=1, top_k=1)

    support = sampler_support(hidden, weight, targets, sampling)
    logprobs, _ = linear_logprobs(hidden, weight, targets, support=support)

    assert float(logprobs) == pytest.approx(-5 - math.log1p(math.exp(-5)), abs=1e-5)


def test_a_sampler_that_leaves_nothing_out_changes_no_bit(tiny_base):
    sampling = SamplingParams(max_tokens=LENGTH, temperature=0.7)
    policy = make_policy(tiny_base)
    samples = drawn(tiny_base, policy, sampling)

    for options in ({}, {"num_updates": 2}, {"loss": "gspo"}):
        of_full, full = update(make_policy(tiny_base), samples, None, lr=0.05, **options)
        of_sampler, found = update(make_policy(tiny_base), samples, sampling, lr=0.05, **options)
        assert all(torch.equal(a[n], b[n]) for a, b in zip(of_full, of_sampler, strict=True) for n in a)
        assert all(map(torch.equal, full.logprobs, found.logprobs)) and full.metrics == found.metrics


def test_the_mass_outside_is_what_truncation_took():
    sample = TrainingSample(
        group_id="0",
        prompt_token_ids=(1,),
        token_ids=(2, 3, 4),
        sampling_logprobs=(math.log(0.5), math.log(0.9), 0.0),
        plain_logprobs=(math.log(0.4), math.log(0.9), math.log(0.1)),
        advantages=(1.0,) * 3,
        loss_mask=(True, True, False),
    )
    plain = dataclasses.replace(sample, group_id="1", plain_logprobs=())

    assert outside_mass(pack([sample], tokens_per_microbatch=9, device="cpu")) == pytest.approx(0.1)
    assert outside_mass(pack([plain], tokens_per_microbatch=9, device="cpu")) == 0


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_importance_weights_of_the_policy_that_sampled_are_one(tiny_base, truncation):
    sampling = SamplingParams(max_tokens=LENGTH, temperature=0.7, **truncation)
    policy = make_policy(tiny_base)
    samples = drawn(tiny_base, policy, sampling)

    (weighted,), result = update(policy, samples, sampling, importance="truncate")
    (plain,), _ = update(make_policy(tiny_base), samples, sampling, importance="off")

    assert result.metrics["importance/weight_mean"] == pytest.approx(1, abs=1e-4)
    assert_same(weighted, plain, rtol=1e-3)
