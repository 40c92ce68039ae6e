"""The packed, prompt-shared, fused step against a plain one: PEFT, padded batches, full logits, autograd."""

import copy
import math

import pytest
import torch
from peft import PeftModel

from rlbench.config.schema import AlgorithmConfig, LoraConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training.optim import learning_rate, make_optimizer, set_lr
from rlbench.training.step import train_step
from tests.models.test_lora import gradients, randomise

TEMPERATURE = 0.8


def make_samples(seed: int = 0, num_groups: int = 3) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples = []
    for group in range(num_groups):
        prompt = tuple(draw(2, 98) for _ in range(draw(1, 12)))
        for _ in range(4):
            n = draw(1, 9)
            samples.append(
                TrainingSample(
                    group_id=f"train/{group}",
                    prompt_token_ids=prompt,
                    token_ids=tuple(draw(2, 98) for _ in range(n)),
                    sampling_logprobs=(-3.0,) * n,
                    advantages=(draw(-100, 100) / 50,) * n,
                    loss_mask=tuple(draw(0, 5) > 0 for _ in range(n)),
                )
            )
    return samples


def captured_gradients(policy: Policy, samples, config: AlgorithmConfig, budget: int) -> dict[str, torch.Tensor]:
    """Adapter gradients of `train_step`, read by an optimizer that changes nothing."""

    class Capture(torch.optim.SGD):
        def step(self, closure=None):
            self.captured = gradients(policy.model)

    optimizer = Capture(policy.parameters(), lr=0.0)
    batches = pack(samples, tokens_per_microbatch=budget, device="cpu")
    result = train_step(policy, batches, optimizer, config, temperature=TEMPERATURE, max_grad_norm=0)
    assert result.is_applied
    return optimizer.captured


def plain_gradients(base, samples, kl_coef: float) -> dict[str, torch.Tensor]:
    """The same loss with PEFT's own forward, one padded batch, logits [B, L, V] and autograd."""
    model = add_lora(share_base(base), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    length = max(len(s.prompt_token_ids) + len(s.token_ids) for s in samples)
    rows = [[*s.prompt_token_ids, *s.token_ids] for s in samples]
    token_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    logprobs = padded_logprobs(model, token_ids, attention_mask)
    with model.disable_adapter(), torch.no_grad():
        ref_logprobs = padded_logprobs(model, token_ids, attention_mask)
    loss = torch.zeros(())
    count = sum(sum(s.loss_mask) for s in samples)
    for i, s in enumerate(samples):
        start = len(s.prompt_token_ids) - 1
        here = slice(start, start + len(s.token_ids))
        mask, advantages = torch.tensor(s.loss_mask), torch.tensor(s.advantages)
        ratio = torch.exp(logprobs[i, here] - logprobs[i, here].detach())
        difference = ref_logprobs[i, here] - logprobs[i, here]
        kl = torch.exp(difference) - difference - 1
        loss = loss + ((-ratio * advantages + kl_coef * kl) * mask).sum() / count
    loss.backward()
    return gradients(model)


def padded_logprobs(model: PeftModel, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=token_ids, attention_mask=attention_mask).logits[:, :-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]


def make_policy(base) -> Policy:
    policy = Policy(base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)
    return policy


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_step_has_the_gradients_of_the_plain_padded_step(tiny_base, kl_coef):
    samples = make_samples()
    config = AlgorithmConfig(kl_coef=kl_coef, importance="off")

    ours = captured_gradients(make_policy(tiny_base), samples, config, budget=1000)
    theirs = plain_gradients(tiny_base, samples, kl_coef)

    assert max(g.abs().max() for g in theirs.values()) > 1e-3
    for (name, grad), expected in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_the_split_into_microbatches_does_not_change_the_gradients(tiny_base):
    samples = make_samples(seed=1)
    config = AlgorithmConfig(kl_coef=0.1)

    whole = captured_gradients(make_policy(tiny_base), samples, config, budget=1000)
    split = captured_gradients(make_policy(tiny_base), samples, config, budget=24)

    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_reference_forward_is_made_without_a_kl_penalty(tiny_base, monkeypatch):
    policy = make_policy(tiny_base)
    monkeypatch.setattr(policy, "reference", lambda: pytest.fail("a reference forward was made"))

    captured_gradients(policy, make_samples(), AlgorithmConfig(kl_coef=0.0), budget=1000)


def test_metrics_are_means_over_loss_tokens_whatever_the_split(tiny_base):
    samples = make_samples(seed=2)
    metrics = []
    for budget in (1000, 24):
        policy = make_policy(tiny_base)
        batches = pack(samples, tokens_per_microbatch=budget, device="cpu")
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        config = AlgorithmConfig(kl_coef=0.1)
        metrics.append(train_step(policy, batches, optimizer, config, temperature=1.0, max_grad_norm=0).metrics)

    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-7)
    assert 0 < metrics[0]["policy/entropy"] < math.log(98)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_base):
    policy = make_policy(tiny_base)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=0.1))
    samples = make_samples()
    batches = pack(samples, tokens_per_microbatch=1000, device="cpu")
    config = AlgorithmConfig()
    assert train_step(policy, batches, optimizer, config, temperature=1.0, max_grad_norm=1.0).is_applied
    before = policy.adapter().fingerprint(), copy.deepcopy(optimizer.state_dict()["state"])

    batches[0].advantages[0] = float("inf")
    batches[0].loss_mask[0] = True
    result = train_step(policy, batches, optimizer, config, temperature=1.0, max_grad_norm=1.0)

    assert not result.is_applied
    assert policy.adapter().fingerprint() == before[0]
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


def test_clipping_scales_the_gradient_and_reports_its_norm_before(tiny_base):
    policy = make_policy(tiny_base)
    batches = pack(make_samples(), tokens_per_microbatch=1000, device="cpu")
    seen = []

    class Capture(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(float(torch.stack([p.grad.norm() for p in policy.parameters()]).norm()))

    optimizer = Capture(policy.parameters(), lr=0.0)
    result = train_step(policy, batches, optimizer, AlgorithmConfig(), temperature=1.0, max_grad_norm=1e-3)

    assert seen[0] == pytest.approx(1e-3, rel=1e-3)
    assert result.metrics["optim/grad_norm"] > 1e-2


def test_the_schedule_warms_up_decays_and_ends_at_the_minimum():
    config = OptimConfig(lr=1.0, warmup_steps=3, schedule="cosine", min_lr_frac=0.1)

    rates = [learning_rate(step, 10, config) for step in range(1, 11)]

    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5  # half-way between steps 4 and 10
    assert rates[6] == pytest.approx(middle)
    assert learning_rate(7, 10, OptimConfig(lr=1.0, warmup_steps=0, schedule="constant")) == 1.0
    linear = OptimConfig(lr=1.0, warmup_steps=0, schedule="linear", min_lr_frac=0.0)
    assert learning_rate(6, 11, linear) == pytest.approx(0.5)


def test_set_lr_reaches_the_update(tiny_base):
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([parameter], OptimConfig(lr=1.0))
    parameter.grad = torch.ones(1)
    set_lr(optimizer, 0.25)

    optimizer.step()

    assert parameter.item() == pytest.approx(0.75)  # Adam's first update is lr times the sign
