"""Value and gradient of our losses and advantages against TRL's own trainers on random ragged batches.

A real trainer is built around the tiny model; only its forward is replaced, by given logprobs and entropies.
"""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.algorithms import ADVANTAGES, KL_ESTIMATORS, POLICY_LOSSES
from rlbench.algorithms.advantages import GroupReturns
from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.algorithms.importance import importance_weights, off_policy_mask
from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.algorithms.selection import top_entropy_threshold
from rlbench.algorithms.shaping import returns_to_go
from rlbench.config.algorithm import LOSSES
from rlbench.engine.vllm_process import clean_start
from tests.algorithms.batches import MAX_TOKENS, Batch, gradient, loss_inputs, make_batch

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

GROUP = 3


def build(trainer_class, config_class, folder, output, **options):
    if "reward_weights" in options:
        options["reward_weights"] = list(options["reward_weights"])
    args = config_class(
        output_dir=str(output),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=6,
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        **options,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)] * 2,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 6}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by transformers when training starts
    return trainer


@pytest.fixture(scope="module")
def make_trainer(tiny_folder, tmp_path_factory):
    made = {}

    def make(trainer_class, config_class, **options):
        key = (trainer_class.__name__, tuple(sorted(options.items())))
        if key not in made:
            output = tmp_path_factory.mktemp("trl")
            made[key] = build(trainer_class, config_class, tiny_folder, output, **options)
        return made[key]

    return make


def their_loss(trainer, batch: Batch, **extra) -> torch.Tensor:
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (batch.logprobs, batch.entropy, None)
    ids = torch.full_like(batch.mask, 5, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs,
        "old_logps": (batch.old_logprobs * batch.mask).sum(1),
        "num_items_in_batch": batch.mask.sum(),
        **extra,
    }
    return trainer._compute_loss(trainer.model, inputs)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, batch: Batch) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = gradient(theirs, batch)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient(ours, batch), expected, rtol=1e-5, atol=1e-7)


def our_loss(name: str, inputs: LossInputs, **options) -> torch.Tensor:
    return POLICY_LOSSES[name](inputs, **{**LOSSES[name].options, **options}).loss


TOKEN = {"epsilon": 0.2, "epsilon_high": 0.28}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
SEQUENCE = {"epsilon": 0.05, "epsilon_high": 0.07, "importance_sampling_level": "sequence"}
CASES = {
    # name: (TRL's options, our loss, our options, our normalization)
    "grpo": ({**TOKEN, "loss_type": "grpo"}, "clipped_surrogate", CLIP, "sequence_mean"),
    "dapo": ({**TOKEN, "loss_type": "dapo"}, "clipped_surrogate", CLIP, "token_mean"),
    "dr_grpo": ({**TOKEN, "loss_type": "dr_grpo"}, "clipped_surrogate", CLIP, "constant"),
    "bnpo": ({**TOKEN, "loss_type": "bnpo"}, "clipped_surrogate", CLIP, "microbatch_token_mean"),
    "delta": (
        {**TOKEN, "loss_type": "dapo", "delta": 1.4}, "clipped_surrogate", {**CLIP, "clip_ratio_max": 1.4}, "token_mean"
    ),
    "gspo": (
        {**SEQUENCE, "loss_type": "grpo"}, "gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.07}, "sequence_mean"
    ),
    "luspo": (
        {**SEQUENCE, "loss_type": "luspo"}, "gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.07}, "sequence_sum"
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, "cispo", {"clip_ratio_max": 1.3}, "token_mean"),
    "sapo": ({"loss_type": "sapo"}, "sapo", {}, "sequence_mean"),
    "vespo": ({"loss_type": "vespo"}, "vespo", {}, "token_mean"),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_policy_losses(make_trainer, case, seed):
    theirs, name, options, normalization = CASES[case]
    batch = make_batch(seed, with_holes=True)
    inputs = loss_inputs(batch, normalization, sampling_logprobs=batch.packed(batch.old_logprobs))

    assert_same(
        our_loss(name, inputs, **options), their_loss(make_trainer(GRPOTrainer, GRPOConfig, **theirs), batch), batch
    )


def test_gmpo(make_trainer):
    batch = make_batch(2, spread=0.5)
    trainer = make_trainer(GMPOTrainer, GMPOConfig, epsilon=0.4, epsilon_high=0.4)

    assert_same(our_loss("gmpo", loss_inputs(batch, "sequence_mean")), their_loss(trainer, batch), batch)


def test_rloo(make_trainer):
    batch = make_batch(3, spread=0.1)
    trainer = make_trainer(RLOOTrainer, RLOOConfig)

    assert_same(our_loss("sequence_surrogate", loss_inputs(batch, "sequence_mean")), their_loss(trainer, batch), batch)


@pytest.mark.parametrize(("estimator", "is_corrected"), [("k3", False), ("k3_unbiased", True)])
@pytest.mark.parametrize(("loss_type", "normalization"), [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_kl_in_the_loss(make_trainer, estimator, is_corrected, loss_type, normalization):
    batch = make_batch(4, with_holes=True)
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, **TOKEN, loss_type=loss_type, beta=0.1, use_bias_correction_kl=is_corrected
    )
    inputs = loss_inputs(batch, normalization)
    kl = KL_ESTIMATORS[estimator](inputs.logprobs, batch.packed(batch.ref_logprobs), inputs.old_logprobs)

    ours = our_loss("clipped_surrogate", inputs, **CLIP) + 0.1 * (kl * inputs.weights).sum()

    assert_same(ours, their_loss(trainer, batch), batch)


def corrected(batch: Batch, normalization: str, factor: torch.Tensor) -> LossInputs:
    inputs = loss_inputs(batch, normalization)
    return loss_inputs(batch, normalization, weights=inputs.weights * factor)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights(make_trainer, mode):
    """TRL computes these weights amid its generation; its loss then multiplies by them (vLLM's flag is set here)."""
    batch = make_batch(5, with_holes=True)
    level, method = mode.split("_")
    low, high = 0.8, 1.3
    inputs = loss_inputs(batch, "token_mean")
    weights, _ = importance_weights(
        inputs.old_logprobs,
        inputs.sampling_logprobs,
        inputs.loss_mask,
        inputs.sequence_ids,
        inputs.num_sequences,
        method=method,
        level=level,
        low=low,
        high=high,
    )
    difference = (batch.old_logprobs - batch.sampling_logprobs) * batch.mask
    ratio = torch.exp(difference if level == "token" else difference.sum(-1, keepdim=True))
    ratio = ratio.clamp(low, high) if method == "truncate" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    trainer = make_trainer(GRPOTrainer, GRPOConfig, **TOKEN, loss_type="dapo")
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    try:
        theirs = their_loss(trainer, batch, importance_sampling_ratio=ratio)
    finally:
        trainer.use_vllm = False

    assert_same(our_loss("clipped_surrogate", corrected(batch, "token_mean", weights), **CLIP), theirs, batch)
    assert len(weights.unique()) > 2


def test_off_policy_mask(make_trainer):
    batch = make_batch(6, with_holes=True)
    inputs = loss_inputs(batch, "token_mean")
    kept = off_policy_mask(
        inputs.logprobs,
        inputs.sampling_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        inputs.sequence_ids,
        inputs.num_sequences,
        threshold=0.02,
    )
    trainer = make_trainer(GRPOTrainer, GRPOConfig, **TOKEN, loss_type="dapo", off_policy_mask_threshold=0.02)

    theirs = their_loss(trainer, batch, sampling_per_token_logps=batch.sampling_logprobs)

    assert_same(our_loss("clipped_surrogate", corrected(batch, "token_mean", kept), **CLIP), theirs, batch)
    assert 0 < kept.float().mean() < 1


def test_top_entropy_tokens(make_trainer):
    batch = make_batch(7, with_holes=True)
    inputs = loss_inputs(batch, "token_mean")
    threshold = top_entropy_threshold(batch.entropy[batch.mask], 0.3)
    chosen = batch.packed(batch.entropy) >= threshold
    trainer = make_trainer(GRPOTrainer, GRPOConfig, **TOKEN, loss_type="dapo", top_entropy_quantile=0.3)

    ours = our_loss("clipped_surrogate", corrected(batch, "token_mean", chosen), **CLIP)

    assert_same(ours, their_loss(trainer, batch), batch)
    assert 0.2 < (chosen & inputs.loss_mask).sum() / inputs.loss_mask.sum() < 0.4


def test_adaptive_entropy_coefficient(make_trainer):
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, loss_type="dapo", use_adaptive_entropy=True, entropy_target=1.5, entropy_coef=0.01
    )
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    control = EntropyControl(coef=0.01, target=1.5, delta=0.005, low=0.0, high=1.0)
    seen = []
    for seed in (0, 1, 2, 3, 4):
        batch = make_batch(seed)
        policy = our_loss("clipped_surrogate", loss_inputs(batch, "token_mean"))
        mean = batch.entropy[batch.mask].mean()

        torch.testing.assert_close(policy - control.applied * mean, their_loss(trainer, batch))
        control.observe(mean.item())
        assert control.coef == pytest.approx(trainer.entropy_coef)
        seen.append(control.applied)
    assert min(seen) == 0 < max(seen)


REWARDS = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0], [0.0, 0.2], [0.3, 1.0]])
WEIGHTS = [1.0, 0.5]


def our_advantages(name: str, **options) -> list[float]:
    groups = []
    for part in REWARDS.split(GROUP):
        components = {str(i): part[:, i].tolist() for i in range(2)}
        sums = (part * torch.tensor(WEIGHTS)).sum(1).tolist()
        groups.append(GroupReturns(returns=[[r] for r in sums], components=components, weights={"0": 1.0, "1": 0.5}))
    return [tokens[0] for group in ADVANTAGES[name](groups, **options) for tokens in group]


ADVANTAGE_CASES = {
    "group": (GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}, "group_relative", {"scale": "group"}),
    "batch": (GRPOTrainer, GRPOConfig, {"scale_rewards": "batch"}, "group_relative", {"scale": "batch"}),
    "none": (GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}, "group_relative", {"scale": "none"}),
    "gdpo": (GRPOTrainer, GRPOConfig, {"multi_objective_aggregation": "normalize_then_sum"}, "gdpo", {}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.0}, "leave_one_out", {"scale": "none"}),
    "rloo, normalised": (
        RLOOTrainer, RLOOConfig, {"beta": 0.0, "normalize_advantages": True}, "leave_one_out", {"scale": "batch"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVANTAGE_CASES)
def test_advantages(make_trainer, case):
    trainer_class, config_class, theirs, name, options = ADVANTAGE_CASES[case]
    trainer = make_trainer(trainer_class, config_class, **theirs, reward_weights=tuple(WEIGHTS))
    trainer._calculate_rewards = lambda *args, **kwargs: REWARDS.clone()

    expected = trainer._generate_and_score_completions([{"prompt": "ab"}] * 6)["advantages"]

    assert our_advantages(name, **options) == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_the_penalty_in_the_reward_is_that_of_rloo(make_trainer):
    """k1 over the completion; TRL's two forwards are replaced by given logprobs, its generation is real."""
    trainer = make_trainer(RLOOTrainer, RLOOConfig, beta=0.1, reward_weights=tuple(WEIGHTS))
    trainer._calculate_rewards = lambda *args, **kwargs: REWARDS.clone()
    generator, given = torch.Generator().manual_seed(0), []

    def forward(model, ids, mask, logits_to_keep, *args, **kwargs):
        given.append(-torch.rand(6, logits_to_keep, generator=generator))
        return given[-1], None, None

    trainer._get_per_token_logps_and_entropies = forward
    found = trainer._generate_and_score_completions([{"prompt": "ab"}] * 6)

    kl = given[0] - given[1]
    lengths = found["completion_mask"].sum(1).tolist()
    sums = (REWARDS * torch.tensor(WEIGHTS)).sum(1).tolist()
    returns = [
        returns_to_go(reward, row[:length].tolist(), 0.1) for reward, row, length in zip(sums, kl, lengths, strict=True)
    ]
    groups = [GroupReturns(returns=returns[start : start + GROUP]) for start in (0, GROUP)]
    ours = [tokens[0] for group in ADVANTAGES["leave_one_out"](groups, scale="none") for tokens in group]

    assert max(lengths) > 1
    assert ours == pytest.approx(found["advantages"].tolist(), rel=1e-5, abs=1e-6)
    assert ours != pytest.approx(our_advantages("leave_one_out", scale="none"), abs=1e-3)
