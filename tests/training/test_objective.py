"""The whole objective of an update from given logprobs, against its terms written out by sequence in float64."""

import pytest
import torch
from torch import Tensor

from rlbench.algorithms.reduce import BatchTotals, token_weights
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.training.objective import Objective
from tests.algorithms.batches import MAX_TOKENS, Batch, make_batch

CLIP = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25}
THRESHOLD = 1.5  # of the entropies of the tokens that are trained on
CASES = {
    "the default correction": {},
    "off": {"importance": "off"},
    "tokens masked": {"importance": "mask", "importance_low": 0.8, "importance_high": 1.3},
    "sequences truncated": {"importance_level": "sequence", "importance_high": 1.1},
    "sequences masked": {"importance": "mask", "importance_level": "sequence", "importance_high": 1.1},
    "geometric": {"importance": "mask", "importance_level": "geometric", "importance_low": 0.9, "importance_high": 1.1},
    "sequences left behind": {"off_policy_threshold": 0.05},
    "k1": {"kl_coef": 0.3, "kl": "k1"},
    "k2": {"kl_coef": 0.3, "kl": "k2"},
    "k3": {"kl_coef": 0.3, "kl": "k3"},
    "k3_unbiased": {"kl_coef": 0.3, "kl": "k3_unbiased"},
    "entropy": {"entropy_coef": 0.2},
    "high entropy alone": {"top_entropy_frac": 0.5, "entropy_coef": 0.2, "kl_coef": 0.3},
}
PARTS = {1: [[*range(8)]], 2: [[0, 1, 2], [3, 4, 5, 6, 7]], 5: [[0], [1], [2, 3], [4, 5, 6], [7]]}


def batch_of(seed: int) -> Batch:
    drawn = make_batch(seed, num_sequences=8, with_holes=True)
    drawn.mask[1] = False
    tensors = {name: getattr(drawn, name).detach() for name in drawn.__dataclass_fields__}
    batch = Batch(**{name: value.double() if value.is_floating_point() else value for name, value in tensors.items()})
    batch.logprobs.requires_grad_()
    batch.entropy.requires_grad_()
    return batch


def ours(batch: Batch, config: AlgorithmConfig, parts: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    num_tokens, is_top = int(batch.mask.sum()), batch.entropy >= THRESHOLD
    acted = batch.mask & is_top if config.top_entropy_frac < 1 else batch.mask
    objective = Objective(
        config=config, num_loss_tokens=num_tokens, num_bonus_tokens=int(acted.sum()), entropy_coef=config.entropy_coef
    )
    totals = BatchTotals(num_loss_tokens=num_tokens, num_sequences=8, max_completion_tokens=MAX_TOKENS)
    losses, metrics = [], []
    for part in parts:
        rows = batch.rows(part)
        ids = torch.arange(len(part))[:, None].expand_as(rows.mask)[rows.present]
        mask = rows.packed(rows.mask)
        columns = {
            "advantages": rows.packed(rows.advantages[:, None].expand_as(rows.mask)),
            "loss_mask": mask,
            "sampling_logprobs": rows.packed(rows.sampling_logprobs),
            "sequence_ids": ids,
            "weights": token_weights(
                mask, ids, config.normalization, totals, num_sequences=len(part), num_microbatches=1
            ).double(),
            "old_logprobs": rows.packed(rows.old_logprobs),
        }
        if config.has_kl_loss:
            columns["ref_logprobs"] = rows.packed(rows.ref_logprobs)
        if config.top_entropy_frac < 1:
            columns["is_top_entropy"] = rows.packed(is_top[part])
        loss, shares = objective(rows.packed(rows.logprobs), rows.packed(rows.entropy), columns, len(part))
        losses.append(loss)
        metrics.append(shares)
    return torch.stack(losses).sum(), {name: sum(part[name] for part in metrics) for name in metrics[0]}


def correction(old: Tensor, sampling: Tensor, config: AlgorithmConfig) -> Tensor:
    gaps, options = old - sampling, config.importance_options()
    if config.importance_method == "off":
        return torch.ones_like(gaps)
    if options["level"] != "token":
        gaps = (gaps.sum() if options["level"] == "sequence" else gaps.mean()).expand_as(gaps)
    rho, low, high = gaps.exp(), options["low"] or 0.0, options["high"]
    if config.importance_method == "truncate":
        return torch.where(rho > high, high, rho)
    return torch.where((rho < low) | (rho > high), 0.0, rho)


def kl_of(p: Tensor, q: Tensor, ref: Tensor, kind: str) -> Tensor:
    d = p - ref
    if kind == "k1":
        return d.detach() + d.detach() * (p - p.detach())
    if kind == "k2":
        return d**2 / 2
    return ((p - q).exp() if kind == "k3_unbiased" else 1.0) * ((-d).exp() + d - 1)


def written_out(batch: Batch, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The loss, a mean over sequences with the bonus by token, and the mean KL of a token."""
    policy_terms, kl_terms = torch.zeros(()).double(), torch.zeros(()).double()
    kl_sum = 0.0
    for row, mask in enumerate(batch.mask):
        if not mask.any():
            continue
        tensors = (batch.logprobs, batch.old_logprobs, batch.sampling_logprobs, batch.ref_logprobs, batch.entropy)
        p, q, sampling, ref, entropy = (values[row][mask] for values in tensors)
        advantage, ratio = batch.advantages[row], (p - q).exp()
        inside = ratio.clamp(1 - CLIP["clip_ratio_low"], 1 + CLIP["clip_ratio_high"])
        per_token = -torch.minimum(ratio * advantage, inside * advantage) * correction(q, sampling, config)
        if config.off_policy_threshold and advantage < 0 and (sampling - p).mean() > config.off_policy_threshold:
            per_token = 0 * per_token
        if config.top_entropy_frac < 1:
            per_token = torch.where(entropy >= THRESHOLD, per_token, 0.0)
        policy_terms = policy_terms + per_token.mean() / 8
        if config.has_kl_loss:
            kl = kl_of(p, q, ref, config.kl)
            kl_terms, kl_sum = kl_terms + kl.mean() / 8, kl_sum + kl.sum()
    acted = batch.mask & (batch.entropy >= THRESHOLD) if config.top_entropy_frac < 1 else batch.mask
    bonus = batch.entropy[acted].mean()
    loss = policy_terms + config.kl_coef * kl_terms - config.entropy_coef * bonus
    return loss, torch.as_tensor(kl_sum / batch.mask.sum())


@pytest.mark.parametrize("num_parts", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_terms_written_out(case, num_parts):
    config = AlgorithmConfig(normalization="sequence_mean", num_updates=2, **CLIP, **CASES[case])
    for seed in (0, 1):
        batch = batch_of(seed)
        expected, kl = written_out(batch, config)

        loss, metrics = ours(batch, config, PARTS[num_parts])

        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
        leaves = (batch.logprobs, batch.entropy)
        found, right = (torch.autograd.grad(v, leaves, allow_unused=True, retain_graph=True) for v in (loss, expected))
        torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=1e-8)
        assert right[0].abs().max() > 1e-3
        if config.entropy_coef:
            torch.testing.assert_close(found[1], right[1], rtol=1e-6, atol=1e-8)
        if config.has_kl_loss:
            torch.testing.assert_close(metrics["kl/reference"], kl, rtol=1e-6, atol=1e-8)


def test_every_case_differs_from_the_plain_loss():
    batch = batch_of(0)
    plain = written_out(batch, AlgorithmConfig(importance="off", normalization="sequence_mean", **CLIP))[0]

    for name, options in CASES.items():
        config = AlgorithmConfig(normalization="sequence_mean", num_updates=2, **CLIP, **options)
        assert (written_out(batch, config)[0] - plain).abs() > 1e-4 or name == "off", name
