"""Out of memory in an update: smaller microbatches, the same gradient, a line that says so."""

from dataclasses import replace

import pytest
import torch

from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.preference import PreferenceConfig
from rlbench.config.schema import LoraConfig
from rlbench.data.packing import num_packed_tokens, pack
from rlbench.data.supervised import given_sample
from rlbench.models.policy import Policy
from rlbench.models.reward_model import RewardModel
from rlbench.training import step as step_module
from rlbench.training.microbatch_budget import MicrobatchBudget, RunMemoryError, phase_memory
from rlbench.training.pair_update import PairOptions, make_pair_batches, update_on_pairs
from rlbench.training.preference_step import make_batch, preference_step, reference_table
from rlbench.training.reward_step import make_reward_batch, reward_step
from rlbench.training.sft_step import sft_step
from rlbench.training.update import make_minibatches, update_policy
from rlbench.training.value_step import update_critic
from tests.models.test_lora import randomise
from tests.training.test_pair_update import EVERY
from tests.training.test_preference_step import CPU, make_rows
from tests.training.test_sft_step import make_rows as make_sft_rows
from tests.training.test_step import TEMPERATURE, make_policy, make_samples
from tests.training.test_update import MAX_TOKENS, Capture
from tests.training.test_value_step import make_critic, samples_with_values


def update(base, config, budget):
    policy = make_policy(base)
    optimizer = Capture(policy, lr=0.05)
    samples = make_samples(0)
    minibatches = make_minibatches(
        samples, config, tokens_per_microbatch=budget.tokens, max_completion_tokens=MAX_TOKENS, device="cpu"
    )
    result = update_policy(
        policy, minibatches, optimizer, config, temperature=TEMPERATURE, max_grad_norm=0,
        entropy_control=EntropyControl(coef=0.0), seed=3, budget=budget,
    )  # fmt: skip
    return optimizer.captured, result


def out_of_memory_above(monkeypatch, limit: int) -> None:
    """Passes of more than `limit` tokens fail after they have left their gradient."""
    real = step_module._backward

    def backward(policy, microbatch, *rest):
        done = real(policy, microbatch, *rest)
        if len(microbatch.token_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return done

    monkeypatch.setattr(step_module, "_backward", backward)


@pytest.mark.parametrize("options", [{"kl_coef": 0.1}, {"num_updates": 2}])
def test_half_the_microbatch_gives_the_same_gradient_and_says_so(tiny_base, monkeypatch, options):
    config, lines = AlgorithmConfig(**options), []
    expected, undisturbed = update(tiny_base, config, MicrobatchBudget(1000, lines.append))
    assert not lines
    total = sum(num_packed_tokens([sample]) for sample in make_samples(0))
    out_of_memory_above(monkeypatch, total // 3)
    budget = MicrobatchBudget(1000, lines.append)

    found, result = update(tiny_base, config, budget)

    assert budget.num_halvings >= 1 and budget.tokens <= total // 2 and len(lines) == budget.num_halvings
    assert f"is {budget.tokens} instead of" in lines[-1] and "Tried to allocate 2.00 GiB" in lines[0]
    assert len(found) == len(expected) == config.num_updates
    for one, other in zip(found, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(result.logprobs), torch.cat(undisturbed.logprobs), rtol=0, atol=1e-5)
    assert [mb.samples for mb in result.microbatches] == [mb.samples for mb in undisturbed.microbatches]


def test_one_sample_that_does_not_fit_is_one_sentence(tiny_base, monkeypatch):
    out_of_memory_above(monkeypatch, 0)

    with pytest.raises(RunMemoryError, match="does not fit in memory with one sample a microbatch"):
        update(tiny_base, AlgorithmConfig(), MicrobatchBudget(1000, lambda line: None))


class KeepsGradient(torch.optim.SGD):
    """Changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.kept: list[torch.Tensor] = []

    def step(self, closure=None):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def sft(base, budget):
    policy = make_policy(base)
    optimizer = KeepsGradient(policy.parameters())
    samples = [given_sample(str(i), ids, mask) for i, (ids, mask) in enumerate(make_sft_rows())]
    microbatches = pack(samples, tokens_per_microbatch=budget.tokens, device="cpu")
    result = sft_step(policy, microbatches, optimizer, max_grad_norm=0, budget=budget)
    return optimizer.kept, result.metrics, result.logprobs


def preferences(base, budget, *losses, is_unpaired=False, has_table=False):
    policy, rows = make_policy(base), make_rows(2, is_unpaired=is_unpaired)
    config, optimizer = PreferenceConfig(losses=list(losses)), KeepsGradient(policy.parameters())
    table = reference_table(policy, rows, is_base=True, tokens_per_microbatch=1000) if has_table else None
    batch = make_batch(rows, config, tokens_per_microbatch=budget.tokens, device=CPU)
    result = preference_step(policy, batch, optimizer, config, max_grad_norm=0, reference=table, budget=budget)
    return optimizer.kept, result.metrics, result.logprobs


def online_pairs(base, budget):
    policy, samples = make_policy(base), make_samples()
    optimizer = KeepsGradient(policy.parameters())
    batches = make_pair_batches(
        samples, EVERY, num_minibatches=1, tokens_per_microbatch=budget.tokens, device=torch.device("cpu")
    )
    options = PairOptions(num_updates=1, temperature=0.7, max_grad_norm=0)
    result = update_on_pairs(policy, batches, optimizer, PreferenceConfig(), options, budget=budget)
    return optimizer.kept, result.metrics, result.logprobs


def reward_model(base, budget):
    model = RewardModel(base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(model.model)
    with torch.no_grad():
        model.head.weight.copy_(torch.linspace(-1, 1, model.head.weight.numel()).view_as(model.head.weight))
    optimizer = KeepsGradient(model.parameters())
    rows = [replace(row, margin=0.5 * i) for i, row in enumerate(make_rows())]
    batch = make_reward_batch(rows, tokens_per_microbatch=budget.tokens, device=CPU)
    result = reward_step(model, batch, optimizer, centering_coef=0.05, max_grad_norm=0, budget=budget)
    return optimizer.kept, result.metrics, result.logprobs


def critic(base, budget):
    values = make_critic(base)
    optimizer = KeepsGradient(values.parameters())
    minibatches = make_minibatches(
        samples_with_values(), AlgorithmConfig(advantage="gae"), tokens_per_microbatch=budget.tokens,
        max_completion_tokens=9, device="cpu",
    )  # fmt: skip
    result = update_critic(
        values, minibatches, optimizer, num_updates=1, clip_value=None, max_grad_norm=0, budget=budget
    )
    return optimizer.kept, result.metrics, []


UPDATES = {
    "sft": (sft, 24),
    "dpo": (lambda base, budget: preferences(base, budget, "sigmoid"), 40),
    "dpo with a table": (lambda base, budget: preferences(base, budget, "sigmoid", has_table=True), 40),
    "a loss that sorts the step": (lambda base, budget: preferences(base, budget, "aot_unpaired"), 40),
    "kto": (lambda base, budget: preferences(base, budget, "kto", is_unpaired=True), 24),
    "online dpo": (online_pairs, 45),
    "reward model": (reward_model, 45),
    "critic": (critic, 60),
}


def passes_fail(monkeypatch, is_too_much) -> list[int]:
    """Passes that keep a gradient and are too much, by their number and their tokens, find no memory."""
    real, sizes = Policy.hidden, []

    def hidden(policy, microbatch):
        if torch.is_grad_enabled():
            sizes.append(len(microbatch.token_ids))
            if is_too_much(len(sizes), sizes[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(policy, microbatch)

    monkeypatch.setattr(Policy, "hidden", hidden)
    return sizes


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_is_made_again_in_smaller_microbatches(tiny_base, monkeypatch, name):
    update_by, tokens = UPDATES[name]
    expected, metrics, logprobs = update_by(tiny_base, MicrobatchBudget(tokens, print))
    lines = []
    sizes = passes_fail(monkeypatch, lambda number, _: number == 2)  # the first has left its gradient
    budget = MicrobatchBudget(tokens, lines.append)

    found, metrics_after, logprobs_after = update_by(tiny_base, budget)

    assert budget.num_halvings == 1 and len(lines) == 1 and budget.tokens < tokens
    assert max(sizes[2:]) <= budget.tokens and len(sizes) > 4
    assert len(found) == len(expected) and max(float(one.abs().max()) for one in expected) > 1e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert metrics_after == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert [len(part) for part in logprobs_after] == [len(part) for part in logprobs]
    for one, other in zip(logprobs_after, logprobs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_that_cannot_fit_is_one_sentence(tiny_base, monkeypatch, name):
    update_by, tokens = UPDATES[name]
    passes_fail(monkeypatch, lambda *_: True)

    unit = "one pair" if name == "reward model" else "one sample"
    with pytest.raises(RunMemoryError, match=f"with {unit} a microbatch .* training.recompute=full"):
        update_by(tiny_base, MicrobatchBudget(tokens, print))


def test_a_longer_sample_gets_room_after_the_budget_was_halved():
    budget = MicrobatchBudget(100, print)
    budget.tokens = 30

    assert [budget.room_for(tokens) for tokens in (20, 30, 50, 200)] == [30, 30, 50, 100]


def test_memory_that_another_phase_lacks_is_one_sentence():
    with pytest.raises(RunMemoryError, match="^teacher does not fit in memory: CUDA out of memory; expected lower "
                       "training.tokens_per_microbatch"):  # fmt: skip
        with phase_memory("teacher"):
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")


def test_pairs_are_those_of_the_same_completions_after_a_split():
    (batch,) = make_pair_batches(make_samples(), EVERY, num_minibatches=1, tokens_per_microbatch=1000, device=CPU)

    after = batch.split(30)

    assert len(after.microbatches) > len(batch.microbatches) and after.samples != batch.samples
    for one, other in zip(batch.pairs.flatten(), after.pairs.flatten(), strict=True):
        assert batch.samples[one] is after.samples[other]
