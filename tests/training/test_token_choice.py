"""Tokens are chosen by statistics of the whole batch, over loss tokens alone, wherever its microbatches are cut."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.training.token_choice import choose_tokens

NUM = 40


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "old_logprobs": -3 * torch.rand(NUM, generator=generator) - 5,
        "advantages": torch.randn(NUM, generator=generator) + 2,
        "entropy": 3 * torch.rand(NUM, generator=generator),
        "loss_mask": torch.rand(NUM, generator=generator) < 0.7,
    }


def chosen(batch: dict[str, torch.Tensor], config: AlgorithmConfig, cuts: list[int], name: str) -> torch.Tensor:
    parts = [
        {key: values[start:end] for key, values in batch.items()}
        for start, end in zip([0, *cuts], [*cuts, NUM], strict=True)
    ]
    microbatches = [SimpleNamespace(loss_mask=p["loss_mask"], advantages=p["advantages"]) for p in parts]
    columns = [{"old_logprobs": p["old_logprobs"]} for p in parts]
    choose_tokens(microbatches, columns, [p["entropy"] for p in parts], config, seed=3)  # type: ignore[arg-type]
    return torch.cat([part[name] for part in columns])


@pytest.mark.parametrize("cuts", [[], [17], [3, 9, 20, 31]])
@pytest.mark.parametrize("seed", [0, 1])
def test_kl_cov_takes_the_highest_covariances_of_the_batch(seed, cuts):
    batch = drawn(seed)
    mask = batch["loss_mask"].numpy()
    logprobs, advantages = (batch[key].numpy().astype(np.float64)[mask] for key in ("old_logprobs", "advantages"))
    covariance = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    expected = np.zeros(NUM, dtype=bool)
    expected[np.flatnonzero(mask)[np.argsort(-covariance)[: int(0.2 * mask.sum())]]] = True

    found = chosen(batch, AlgorithmConfig(loss="kl_cov", covariance_frac=0.2), cuts, "is_selected")

    assert found.tolist() == expected.tolist() and 3 < expected.sum() < mask.sum()


@pytest.mark.parametrize("cuts", [[], [17], [3, 9, 20, 31]])
def test_clip_cov_draws_the_same_tokens_within_the_bounds_whatever_the_cut(cuts):
    batch, mask = drawn(2), drawn(2)["loss_mask"]
    logprobs, advantages = batch["old_logprobs"], batch["advantages"]
    covariance = (logprobs - logprobs[mask].mean()) * (advantages - advantages[mask].mean())
    config = AlgorithmConfig(loss="clip_cov", covariance_frac=0.1, covariance_low=0.05, covariance_high=1.0)

    found = chosen(batch, config, cuts, "is_selected")

    within = mask & (covariance >= 0.05) & (covariance <= 1.0)
    assert found.sum() == int(0.1 * mask.sum()) < within.sum() and not (found & ~within).any()
    assert torch.equal(found, chosen(batch, config, [], "is_selected"))


@pytest.mark.parametrize("cuts", [[], [17], [3, 9, 20, 31]])
def test_the_tokens_of_highest_entropy_are_those_of_the_batch(cuts):
    batch = drawn(4)
    mask, entropy = batch["loss_mask"].numpy(), batch["entropy"].numpy()
    threshold = np.quantile(entropy[mask], 0.75)

    found = chosen(batch, AlgorithmConfig(top_entropy_frac=0.25), cuts, "is_top_entropy")

    assert found.tolist() == (mask & (entropy >= threshold)).tolist() and found.any()
