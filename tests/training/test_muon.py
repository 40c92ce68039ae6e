"""Muon for matrices with AdamW for the rest: torch's own updates, one learning rate, one state, and it learns."""

import copy
import random

import pytest
import torch
from torch import nn

from rlbench.config.schema import LoraConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.models.full_policy import FullPolicy
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training.muon import MuonAdamW
from rlbench.training.optim import learning_rate, make_optimizer, set_lr
from rlbench.training.sft_step import sft_step

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a norm, a row (value head), and an embedding."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4,), (1, 4), (9, 4))]


def set_gradients(values: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)


def test_each_part_makes_torchs_own_update():
    ours, theirs = parameters(), parameters()
    optimizer = MuonAdamW(ours, momentum=0.9, others=ours[3:], **OPTIONS)
    shared = {"lr": 0.02, "weight_decay": 0.1}
    muon = torch.optim.Muon(theirs[:1], **shared, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1:], **OPTIONS)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        muon.step()
        adamw.step()

    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)
    assert set(optimizer.state[ours[0]]) == {"momentum_buffer"} and set(optimizer.state[ours[3]]) > {"exp_avg"}


def test_a_matrix_moves_orthogonally_and_as_far_as_adamw_would():
    matrix = nn.Parameter(torch.zeros(32, 16))
    optimizer = make_optimizer([matrix], OptimConfig(name="muon", lr=0.01))
    set_gradients([matrix], 0)

    optimizer.step()

    update = matrix.detach() / (0.01 * 0.2 * 32**0.5)
    singular = torch.linalg.svdvals(update)
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3  # Newton-Schulz's five steps are that near
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.15)


def test_the_learning_rate_of_both_parts_is_set_and_gradients_are_cleared():
    values = parameters()
    optimizer = MuonAdamW(values, momentum=0.95, others=values[3:], **OPTIONS)
    before = [value.detach().clone() for value in values]
    set_lr(optimizer, 0.0)
    set_gradients(values, 0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    assert len(optimizer.param_groups) == 2 and all(value.grad is None for value in values)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


def test_embeddings_and_head_of_a_model_are_left_to_adamw(tiny_base):
    policy = FullPolicy(copy.deepcopy(tiny_base))
    names = {id(parameter): name for name, parameter in policy.named_parameters()}

    assert [names[id(p)] for p in policy.table_parameters()] == ["model.embed_tokens.weight", "lm_head.weight"]
    optimizer = make_optimizer(policy.parameters(), OptimConfig(name="muon", lr=1e-4), tables=policy.table_parameters())
    matrices, rest = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(matrices) == 2 * 7 and all("proj" in name for name in matrices)
    assert "model.norm.weight" in rest and "lm_head.weight" in rest


def sums(seed: int) -> list[TrainingSample]:
    """Two digits and their sum, in a language of its own."""
    draw, samples = random.Random(seed), []
    for index in range(16):
        a, b = draw.randrange(10), draw.randrange(10)
        samples.append(
            TrainingSample(
                group_id=str(index),
                prompt_token_ids=(20 + a, 50, 20 + b, 51),
                token_ids=(20 + (a + b) // 10, 20 + (a + b) % 10, 1),
                sampling_logprobs=(0.0,) * 3,
                advantages=(0.0,) * 3,
                loss_mask=(True,) * 3,
            )
        )
    return samples


def loss_at_the_end(policy: Policy, config: OptimConfig, num_steps: int = 120) -> float:
    optimizer = make_optimizer(policy.parameters(), config, tables=policy.table_parameters())
    policy.follow(optimizer)
    losses = []
    for step in range(num_steps):
        set_lr(optimizer, learning_rate(step + 1, num_steps, config))
        batches = pack(sums(step), tokens_per_microbatch=2000, device="cpu")
        losses.append(sft_step(policy, batches, optimizer, max_grad_norm=1.0).metrics["loss/nll"])
    return sum(losses[-10:]) / 10


def test_each_at_its_best_learning_rate_muon_ends_lower_than_adamw(tiny_base):
    """Best of 0.001, 0.003, 0.01, 0.03, 0.1. Measured: all weights 0.009 and 0.037 nats, LoRA 0.145 and 0.339."""

    def loss(name: str, lr: float, is_full: bool) -> float:
        base = copy.deepcopy(tiny_base)
        policy = FullPolicy(base) if is_full else Policy(base, LoraConfig(rank=8), seed=0)
        return loss_at_the_end(policy, OptimConfig(name=name, lr=lr))

    for is_full in (True, False):
        assert loss("muon", 0.01, is_full) < 0.7 * loss("adamw", 0.003, is_full) < 0.35


def test_momentum_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="optim.momentum is 0.9, which optim.name=adamw does not read"):
        OptimConfig(momentum=0.9)
    assert OptimConfig(name="muon", momentum=0.9).momentum == 0.9
