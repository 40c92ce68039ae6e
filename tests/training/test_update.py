"""Every loss end to end: the packed, chunked, partly skipped update against plain autograd on full logits."""

import dataclasses

import pytest
import torch

from rlbench.algorithms import POLICY_LOSSES
from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.algorithms.loss_inputs import LossInputs, LossOutput, weighted_sum
from rlbench.algorithms.reduce import BatchTotals
from rlbench.config import algorithm as settings
from rlbench.config.algorithm import LOSSES, AlgorithmConfig, LossSpec
from rlbench.config.schema import LoraConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training import step as step_module
from rlbench.training.optim import make_optimizer
from rlbench.training.update import make_minibatches, update_policy
from tests.models.test_lora import gradients, randomise
from tests.training.test_step import TEMPERATURE, make_policy, make_samples, padded_logprobs

MAX_TOKENS = 8
# Sequences that one update moves are outside of the default clip, where there is no gradient to compare.
WIDE_CLIP = {"clip_ratio_low": 0.9, "clip_ratio_high": 5.0}


class Capture(torch.optim.SGD):
    """Changes nothing and keeps the gradients of every step."""

    def __init__(self, policy: Policy, lr: float = 0.0):
        super().__init__(policy.parameters(), lr=lr)
        self.policy = policy
        self.captured: list[dict[str, torch.Tensor]] = []

    def step(self, closure=None):
        self.captured.append({name: grad.clone() for name, grad in gradients(self.policy.model).items()})
        super().step()


def run_update(policy, samples, config, budget=1000, lr=0.0, control=None):
    optimizer = Capture(policy, lr)
    minibatches = make_minibatches(
        samples, config, tokens_per_microbatch=budget, max_completion_tokens=MAX_TOKENS, device="cpu"
    )
    result = update_policy(
        policy,
        minibatches,
        optimizer,
        config,
        temperature=TEMPERATURE,
        max_grad_norm=0,
        entropy_control=control or EntropyControl(coef=config.entropy_coef),
        seed=3,
    )
    assert result.is_finite
    return optimizer.captured, result


def near_policy(samples, policy, noise=0.2) -> list[TrainingSample]:
    """The samples with sampling logprobs near the policy's: an engine that differs a little."""
    (microbatch,) = pack(samples, tokens_per_microbatch=10_000, device="cpu")
    logprobs, _ = step_module.policy_logprobs(policy, microbatch, TEMPERATURE)
    noisy = logprobs + noise * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(5))
    parts = noisy.split([len(s.token_ids) for s in samples])
    return [
        dataclasses.replace(s, sampling_logprobs=tuple(p.tolist()), advantages=s.advantages)
        for s, p in zip(samples, parts, strict=True)
    ]


def plain_model(base):
    model = add_lora(share_base(base), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    return model


def plain_logprobs(model, samples) -> torch.Tensor:
    """With PEFT's own forward on one padded batch and full logits: [N], samples one after the other."""
    rows = [[*s.prompt_token_ids, *s.token_ids] for s in samples]
    length = max(map(len, rows))
    token_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    logprobs = padded_logprobs(model, token_ids, attention_mask)
    starts = [len(s.prompt_token_ids) - 1 for s in samples]
    return torch.cat(
        [logprobs[i, a : a + len(s.token_ids)] for i, (a, s) in enumerate(zip(starts, samples, strict=True))]
    )


def plain_loss(model, samples, config: AlgorithmConfig, old: torch.Tensor | None = None) -> torch.Tensor:
    """Policy loss with token-level truncated weights and mean over sequences, written out."""
    logprobs = plain_logprobs(model, samples)
    old = logprobs.detach() if old is None else old
    sampling = torch.tensor([x for s in samples for x in s.sampling_logprobs])
    mask = torch.tensor([x for s in samples for x in s.loss_mask])
    weight = torch.cat(
        [torch.full((len(s.token_ids),), 1 / (len(samples) * max(1, sum(s.loss_mask)))) for s in samples]
    )
    if config.importance_method == "truncate":
        weight = weight * (old - sampling).exp().clamp(max=2.0)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        sampling_logprobs=sampling,
        advantages=torch.tensor([x for s in samples for x in s.advantages]),
        loss_mask=mask,
        weights=weight * mask,
        sequence_ids=torch.tensor([i for i, s in enumerate(samples) for _ in s.token_ids]),
        num_sequences=len(samples),
        num_loss_tokens=int(mask.sum()),
    )
    return POLICY_LOSSES[config.loss](inputs, **config.loss_options()).loss


def assert_same(ours, theirs, rtol=1e-3, atol=1e-5):
    assert max(g.abs().max() for g in theirs.values()) > 1e-4
    for (name, grad), expected in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=rtol, atol=atol, msg=name)


PLAIN = [name for name, spec in LOSSES.items() if not spec.needs_selection]


@pytest.mark.parametrize("name", PLAIN)
def test_the_first_update_has_the_gradient_of_plain_autograd(tiny_base, name):
    policy = make_policy(tiny_base)
    samples = near_policy(make_samples(), policy)
    config = AlgorithmConfig(loss=name, normalization="sequence_mean")

    (ours,), _ = run_update(policy, samples, config, budget=40)
    model = plain_model(tiny_base)
    plain_loss(model, samples, config).backward()

    assert_same(ours, gradients(model))


@pytest.mark.parametrize("name", PLAIN)
def test_the_second_update_takes_its_ratios_to_the_policy_before_the_first(tiny_base, name):
    policy = make_policy(tiny_base)
    samples = near_policy(make_samples(), policy)
    clip = WIDE_CLIP if "clip_ratio_low" in LOSSES[name].options else {}
    config = AlgorithmConfig(loss=name, normalization="sequence_mean", num_updates=2, **clip)
    lr = 0.05

    (first, second), result = run_update(policy, samples, config, budget=40, lr=lr)
    model = plain_model(tiny_base)
    old = plain_logprobs(model, samples).detach()
    plain_loss(model, samples, config, old).backward()
    assert_same(first, gradients(model))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter -= lr * parameter.grad
            parameter.grad = None
    loss = plain_loss(model, samples, config, old)
    loss.backward()

    assert_same(second, gradients(model))
    assert result.num_applied == 2 and result.metrics["policy/kl_to_old"] > 1e-6


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_split_into_microbatches_changes_no_gradient(tiny_base, name):
    policy = make_policy(tiny_base)
    samples = near_policy(make_samples(seed=1), policy)
    selection = {"covariance_frac": 0.2} if LOSSES[name].needs_selection else {}
    if name == "clip_cov":
        selection |= {"covariance_low": 0.0, "covariance_high": 100.0}
    config = AlgorithmConfig(loss=name, normalization="sequence_mean", kl_coef=0.1, entropy_coef=0.05, **selection)

    (whole,), a = run_update(policy, samples, config)
    (split,), b = run_update(policy, samples, config, budget=24)

    if name == "clip_cov":  # its random choice is by place in the batch, which packing changes
        assert a.metrics["loss/selected_frac"] == pytest.approx(b.metrics["loss/selected_frac"])
        return
    assert_same(split, whole, rtol=1e-3, atol=1e-6)
    assert a.metrics == pytest.approx(b.metrics, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_weights_of_whole_sequences_do_not_depend_on_chunks_or_microbatches(tiny_base, level):
    policy = make_policy(tiny_base)
    samples = near_policy(make_samples(seed=2), policy)
    config = AlgorithmConfig(
        importance="mask", importance_level=level, importance_low=0.8, importance_high=1.2, off_policy_threshold=0.05
    )

    (whole,), a = run_update(policy, samples, config)
    (split,), _ = run_update(policy, samples, config, budget=24)

    assert_same(split, whole, rtol=1e-3, atol=1e-6)
    assert 0 < a.metrics["importance/outside_frac"] < 1 and 0 < a.metrics["importance/off_policy_frac"] < 1


def with_silent_groups(samples):
    """Half of the groups without advantage, as when all their rewards are equal."""
    return [
        dataclasses.replace(s, advantages=(0.0,) * len(s.token_ids)) if s.group_id in ("train/0", "train/2") else s
        for s in samples
    ]


@pytest.mark.parametrize(
    ("name", "normalization"),
    [(name, "token_mean") for name in PLAIN]
    + [("clipped_surrogate", n) for n in ("sequence_mean", "sequence_sum", "constant")],
)
def test_samples_without_advantage_are_skipped_with_the_same_gradient(tiny_base, name, normalization, monkeypatch):
    policy = make_policy(tiny_base)
    samples = with_silent_groups(near_policy(make_samples(num_groups=4), policy))
    config = AlgorithmConfig(loss=name, normalization=normalization)
    forwarded = []
    monkeypatch.setattr(
        policy, "hidden", lambda mb, hidden=policy.hidden: (forwarded.append(mb.num_sequences), hidden(mb))[1]
    )

    (skipped,), _ = run_update(policy, samples, config)
    monkeypatch.setattr(AlgorithmConfig, "needs_every_sample", True)
    (complete,), _ = run_update(policy, samples, config)

    assert forwarded == [8, 16]
    assert_same(skipped, complete, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_frac": 0.5}])
def test_samples_without_advantage_stay_where_another_term_needs_them(tiny_base, options):
    samples = with_silent_groups(make_samples())

    (minibatch,) = make_minibatches(
        samples, AlgorithmConfig(**options), tokens_per_microbatch=1000, max_completion_tokens=8, device="cpu"
    )

    assert sum(mb.num_sequences for mb in minibatch.microbatches) == len(samples)


def test_one_update_makes_no_forward_besides_its_own(tiny_base, monkeypatch):
    policy = make_policy(tiny_base)
    monkeypatch.setattr(step_module, "policy_logprobs", lambda *a: pytest.fail("old logprobs were computed"))
    monkeypatch.setattr(step_module, "reference_logprobs", lambda *a: pytest.fail("a reference forward was made"))

    run_update(policy, make_samples(), AlgorithmConfig())


def test_the_reference_is_computed_once_for_all_updates(tiny_base, monkeypatch):
    policy = make_policy(tiny_base)
    calls = []
    original = step_module.reference_logprobs
    monkeypatch.setattr(step_module, "reference_logprobs", lambda *a: (calls.append(1), original(*a))[1])

    _, result = run_update(policy, make_samples(), AlgorithmConfig(kl_coef=0.1, num_updates=3), lr=0.01)

    assert len(calls) == 1 and result.num_applied == 3


def test_minibatches_keep_groups_whole_and_take_turns(tiny_base):
    policy = make_policy(tiny_base)
    samples = make_samples(num_groups=5)
    config = AlgorithmConfig(num_minibatches=2, num_updates=4)

    parts = make_minibatches(samples, config, tokens_per_microbatch=1000, max_completion_tokens=8, device="cpu")
    captured, _ = run_update(policy, samples, config)

    groups = [{s.group_id for mb in part.microbatches for s in mb.samples} for part in parts]
    assert groups == [{"train/0", "train/1", "train/2"}, {"train/3", "train/4"}]
    assert [part.totals.num_sequences for part in parts] == [12, 8]
    assert_same(captured[2], captured[0], rtol=1e-5)  # the learning rate is 0
    assert_same(captured[3], captured[1], rtol=1e-5)
    assert any((captured[0][name] - captured[1][name]).abs().max() > 1e-4 for name in captured[0])


def test_the_denominators_count_what_is_left_out_and_the_token_limit(tiny_base):
    samples = with_silent_groups(make_samples(num_groups=4))
    samples[0] = dataclasses.replace(samples[0], loss_mask=(False,) * len(samples[0].token_ids))

    minibatches = make_minibatches(
        samples, AlgorithmConfig(), tokens_per_microbatch=1000, max_completion_tokens=77, device="cpu"
    )

    assert [minibatch.totals for minibatch in minibatches] == [
        BatchTotals(num_loss_tokens=sum(sum(s.loss_mask) for s in samples), num_sequences=16, max_completion_tokens=77)
    ]
    assert sum(mb.num_sequences for mb in minibatches[0].microbatches) == 8


def test_the_entropy_bonus_has_the_gradient_of_the_mean_entropy(tiny_base):
    policy = make_policy(tiny_base)
    silent = [dataclasses.replace(s, advantages=(0.0,) * len(s.token_ids)) for s in make_samples()]
    (ours,), _ = run_update(policy, silent, AlgorithmConfig(entropy_coef=0.5), budget=40)

    model = plain_model(tiny_base)
    total, count = torch.zeros(()), 0
    for s in silent:
        ids = torch.tensor([[*s.prompt_token_ids, *s.token_ids]])
        start = len(s.prompt_token_ids) - 1
        logits = model(input_ids=ids).logits[0, start : start + len(s.token_ids)] / TEMPERATURE
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        total = total + (entropy * torch.tensor(s.loss_mask)).sum()
        count += sum(s.loss_mask)
    (-0.5 * total / count).backward()

    assert_same(ours, gradients(model))


def test_the_entropy_is_fed_back_into_its_control(tiny_base):
    config = AlgorithmConfig(entropy_target=10.0, num_updates=3)
    control = EntropyControl(coef=0.0, target=10.0, delta=0.1)

    _, result = run_update(make_policy(tiny_base), make_samples(), config, control=control)

    assert control.coef == pytest.approx(0.3) and 0 < control.last_entropy < 5
    assert result.metrics["entropy/coef"] == pytest.approx(0.2)  # mean of 0.1, 0.2, 0.3


def test_only_tokens_of_high_entropy_are_trained_on(tiny_base):
    policy = make_policy(tiny_base)
    _, result = run_update(policy, make_samples(num_groups=6), AlgorithmConfig(top_entropy_frac=0.25), budget=40)

    assert result.metrics["policy/top_entropy_frac"] == pytest.approx(0.25, abs=0.03)


def test_a_loss_from_outside_is_trained_with(tiny_base, monkeypatch):
    """The recipe of README: a function with a line in POLICY_LOSSES, a line in LOSSES, and a field for an option."""

    def scaled_reinforce(inputs: LossInputs, *, clip_ratio_max: float) -> LossOutput:
        per_token = -clip_ratio_max * inputs.advantages * torch.where(inputs.loss_mask, inputs.logprobs, 0.0)
        return LossOutput(loss=weighted_sum(per_token, inputs), metrics={"loss/mine": inputs.weights.sum()})

    monkeypatch.setitem(POLICY_LOSSES, "scaled_reinforce", scaled_reinforce)
    monkeypatch.setitem(settings.LOSSES, "scaled_reinforce", LossSpec(options={"clip_ratio_max": 3.0}))
    policy, samples = make_policy(tiny_base), make_samples()

    (mine,), result = run_update(policy, samples, AlgorithmConfig(loss="scaled_reinforce", importance="off"))
    (plain,), _ = run_update(policy, samples, AlgorithmConfig(loss="reinforce", importance="off"))

    assert_same(mine, {name: 3 * grad for name, grad in plain.items()}, rtol=1e-4)
    assert result.metrics["loss/mine"] == pytest.approx(1.0)


def test_updates_stop_at_the_first_that_is_not_finite(tiny_base):
    policy = make_policy(tiny_base)
    samples = make_samples()
    samples[0] = dataclasses.replace(samples[0], advantages=(float("inf"),) * len(samples[0].token_ids),
                                     loss_mask=(True,) * len(samples[0].token_ids))  # fmt: skip
    config = AlgorithmConfig(num_updates=3)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-4))
    before = policy.adapter().fingerprint()
    minibatches = make_minibatches(samples, config, tokens_per_microbatch=1000, max_completion_tokens=8, device="cpu")

    result = update_policy(
        policy, minibatches, optimizer, config, temperature=1.0, max_grad_norm=1.0,
        entropy_control=EntropyControl(coef=0.0), seed=0,
    )  # fmt: skip

    assert (result.is_finite, result.num_applied) == (False, 0)
    assert policy.adapter().fingerprint() == before
