"""Out of memory in an update: smaller microbatches, the same gradient, a line that says so."""

import pytest
import torch

from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.data.packing import num_packed_tokens
from rlbench.training import step as step_module
from rlbench.training.microbatch_budget import MicrobatchBudget, RunMemoryError
from rlbench.training.update import make_minibatches, update_policy
from tests.training.test_step import TEMPERATURE, make_policy, make_samples
from tests.training.test_update import MAX_TOKENS, Capture


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
