"""GaLore: algorithm 2 written out in float64, what is not projected, the interval, bytes, refusals, and it learns."""

import copy
import random

import pytest
import torch
from torch import nn

from rlbench.config.optim import GaloreConfig
from rlbench.config.schema import LoraConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.models.full_policy import FullPolicy
from rlbench.models.moments import MomentBytes
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training.galore import GaloreAdamW, leading_basis, likeness
from rlbench.training.optim import make_optimizer, moment_bytes, set_lr
from rlbench.training.sft_step import sft_step

ADAMW = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def adamw(groups):
    return torch.optim.AdamW(groups, **ADAMW)


def galore(parameters, **options) -> GaloreAdamW:
    return GaloreAdamW(
        parameters, adamw, **{"rank": 3, "interval": 4, "threshold": None, "scale": 0.5, **options}, **ADAMW
    )


def set_gradients(values, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)


def start(*shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_updates_are_those_of_the_papers_algorithm_in_float64(shape):
    (matrix,) = start(shape)
    expected, optimizer = matrix.detach().double(), galore([matrix])
    m = v = basis = None
    for step in range(1, 11):
        set_gradients([matrix], step)
        gradient = matrix.grad.double()
        optimizer.step()

        if (step - 1) % 4 == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            found = u[:, :3] if shape[0] <= shape[1] else vh[:3].T
            basis = found if basis is None else found
            signs = (optimizer.state[matrix]["basis"].double() * found.flip(1)).sum(0).sign()
            basis = found.flip(1) * signs  # ours ascend, and a singular vector has no sign
        low = basis.T @ gradient if shape[0] <= shape[1] else gradient @ basis
        m = 0.1 * low if m is None else 0.9 * m + 0.1 * low
        v = 0.01 * low**2 if v is None else 0.99 * v + 0.01 * low**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        back = basis @ update if shape[0] <= shape[1] else update @ basis.T
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.5 * back

        torch.testing.assert_close(matrix.detach().double(), expected, rtol=0, atol=2e-6)


def test_what_is_not_projected_is_plain_adamw():
    shapes = ((6, 9), (5,), (1, 7), (9, 8), (3, 20))  # a norm, a row, an embedding, a side no longer than the rank
    ours, theirs = start(*shapes), start(*shapes)
    optimizer, plain = galore(ours, others=ours[3:4]), torch.optim.AdamW(theirs[1:], **ADAMW)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        plain.step()

    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(mine, expected)
    assert set(optimizer.state[ours[0]]) == {"step", "exp_avg", "exp_avg_sq", "basis", "age", "interval"}
    assert optimizer.state[ours[0]]["exp_avg"].shape == (3, 9) and optimizer.state[ours[3]]["exp_avg"].shape == (9, 8)


def test_the_learning_rate_is_that_of_the_schedule():
    (matrix,) = start((6, 9))
    optimizer, before = galore([matrix]), matrix.detach().clone()
    set_gradients([matrix], 0)
    set_lr(optimizer, 0.0)
    optimizer.step()

    assert torch.equal(matrix, before)


@pytest.mark.parametrize(("threshold", "is_same", "interval"), [(0.9, True, 2), (0.9, False, 1), (None, True, 1)])
def test_the_interval_doubles_where_the_subspace_stays(threshold, is_same, interval):
    (matrix,) = start((6, 9))
    optimizer = galore([matrix], interval=1, threshold=threshold)
    for step in range(2):
        set_gradients([matrix], 0 if is_same else step)
        optimizer.step()

    assert optimizer.state[matrix]["interval"] == interval and optimizer.state[matrix]["age"] == 1
    set_gradients([matrix], 5)
    basis = optimizer.state[matrix]["basis"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[matrix]["basis"], basis) == (interval == 2)


def test_a_basis_is_orthonormal_and_spans_the_largest_singular_vectors_whatever_the_gradients_size():
    left, right = (
        torch.linalg.qr(torch.randn(size, 4, generator=torch.Generator().manual_seed(1)))[0] for size in (8, 20)
    )
    for size in (1e-18, 1.0, 1e18):
        basis = leading_basis(size * (left * torch.tensor([5.0, 4.0, 1e-3, 1e-4])) @ right.T, 2)

        torch.testing.assert_close(basis.T @ basis, torch.eye(2))
        assert (left[:, :2].T @ basis).square().sum() > 2 - 1e-4
        assert all(column[column.abs().argmax()] > 0 for column in basis.T)
    assert torch.isfinite(leading_basis(torch.zeros(4, 6), 2)).all()


def test_likeness_is_one_of_a_subspace_with_itself_and_nought_by_chance():
    generator = torch.Generator().manual_seed(2)
    bases = [torch.linalg.qr(torch.randn(192, 128, generator=generator))[0] for _ in range(9)]
    rotated = bases[0] @ torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]

    assert likeness(bases[0], rotated) == pytest.approx(1.0, abs=1e-4)
    assert sum(likeness(bases[0], other) for other in bases[1:]) / 8 == pytest.approx(0.0, abs=0.02)


def test_a_rank_that_projects_nothing_is_refused(tiny_base):
    policy = Policy(tiny_base, LoraConfig(rank=4), seed=0)
    with pytest.raises(ValueError, match=r"optim.galore.rank is 128, but no trained matrix is larger both ways"):
        make_optimizer(policy.parameters(), OptimConfig(name="galore", lr=1e-4))


def test_settings_of_galore_without_it_are_refused():
    with pytest.raises(ValueError, match=r"optim\.galore is set, which optim\.name=adamw does not read; expected its"):
        OptimConfig(galore=GaloreConfig(rank=64))


def test_moments_are_counted_as_they_are_kept(tiny_base):
    policy = FullPolicy(copy.deepcopy(tiny_base))
    scales = ("qmap1", "qmap2", "absmax1", "absmax2")
    for name in ("adamw", "adamw_8bit", "muon", "galore", "galore_8bit"):
        if name.endswith("8bit"):
            pytest.importorskip("bitsandbytes")
        settings = GaloreConfig(rank=8) if name.startswith("galore") else GaloreConfig()
        config = OptimConfig(name=name, lr=1e-4, galore=settings)
        optimizer = make_optimizer(policy.parameters(), config, tables=policy.table_parameters())
        set_gradients(policy.parameters(), 0)
        optimizer.step()

        kept = sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for key, value in state.items()
            if key not in ("step", "age", "interval", *scales)
        )
        kept += sum(4 * stand_in.numel() for stand_in in getattr(optimizer, "_stand_ins", {}).values())
        found = moment_bytes(policy.parameters(), config, tables=policy.table_parameters())
        assert found == MomentBytes(device=kept)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["galore", "galore_8bit"])
def test_all_weights_learn_with_it(tiny_base, name):
    if name == "galore_8bit":
        pytest.importorskip("bitsandbytes")
    draw = random.Random(0)
    samples = [
        TrainingSample(
            group_id=str(row), prompt_token_ids=(1, 2), token_ids=tuple(draw.randrange(3, 60) for _ in range(8)),
            sampling_logprobs=(0.0,) * 8, advantages=(0.0,) * 8, loss_mask=(True,) * 8,
        )
        for row in range(4)
    ]  # fmt: skip
    policy = FullPolicy(copy.deepcopy(tiny_base))
    config = OptimConfig(name=name, lr=3e-3, galore=GaloreConfig(rank=8, interval=5))
    optimizer = make_optimizer(policy.parameters(), config, tables=policy.table_parameters())
    policy.follow(optimizer)
    batches = pack(samples, tokens_per_microbatch=100, device="cpu")
    losses = [sft_step(policy, batches, optimizer, max_grad_norm=1.0).metrics["loss/total"] for _ in range(25)]

    assert losses[-1] < 0.5 * losses[0]
