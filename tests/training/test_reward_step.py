"""The packed reward step against a plain one: PEFT, one row a completion, the hidden state of its last token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlbench.config.schema import LoraConfig
from rlbench.config.trained_reward import TrainedReward
from rlbench.data.preferences import PreferenceRow
from rlbench.models.reward_model import RewardModel
from rlbench.records import Completion, Prompt
from rlbench.rollouts.trained_reward import RewardModelScorer
from rlbench.training.reward_step import held_out_rewards, make_reward_batch, reward_step
from tests.models.test_lora import gradients, randomise
from tests.training.test_preference_step import CPU, assert_same, make_rows, plain_model

LORA = LoraConfig(rank=4, alpha=8)
COEF = 0.05


@pytest.fixture
def model(tiny_base) -> RewardModel:
    model = RewardModel(tiny_base, LORA, seed=0)
    randomise(model.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator) / 8)
        model.head.bias.fill_(0.3)
    return model


def plain_scores(plain, head, row: PreferenceRow) -> torch.Tensor:
    scores = []
    for completion in row.completions:
        token_ids = torch.tensor([[*row.prompt_token_ids, *completion]])
        hidden = plain.base_model.model.model(input_ids=token_ids).last_hidden_state[0, -1]
        scores.append(F.linear(hidden, head.weight, head.bias)[0])
    return torch.stack(scores)


def rows_with_margins() -> list[PreferenceRow]:
    return [replace(row, margin=0.5 * (i % 2)) for i, row in enumerate(make_rows())]


@pytest.mark.parametrize("budget", [26, 1000])
def test_loss_scores_and_gradients_are_those_of_a_plain_step(tiny_base, model, budget):
    rows, plain = rows_with_margins(), plain_model(tiny_base)
    scores = torch.stack([plain_scores(plain, model.head, row) for row in rows])
    margins = torch.tensor([row.margin for row in rows])
    expected = (-F.logsigmoid(scores[:, 0] - scores[:, 1] - margins) + COEF * (scores[:, 0] + scores[:, 1]) ** 2).mean()
    expected.backward()
    head_gradient = model.head.weight.grad.clone()
    captured = {}

    class Capture(torch.optim.SGD):
        def step(self, closure=None):
            captured.update(gradients(model.model), head=model.head.weight.grad.clone())

    batch = make_reward_batch(rows, tokens_per_microbatch=budget, device=CPU)
    held_out, found = held_out_rewards(model, batch, centering_coef=COEF)
    optimizer = Capture(model.parameters(), lr=0.0)
    result = reward_step(model, batch, optimizer, centering_coef=COEF, max_grad_norm=0)

    assert (len(batch.microbatches) > 1) == (budget == 26)
    torch.testing.assert_close(found.sort().values, scores.detach().flatten().sort().values, rtol=1e-4, atol=1e-5)
    assert result.metrics["loss/reward_model"] == pytest.approx(expected.item(), rel=1e-5)
    assert held_out == pytest.approx({key: result.metrics[key] for key in held_out}, rel=1e-5)
    assert held_out["reward_model/accuracy"] == pytest.approx(float((scores[:, 0] > scores[:, 1]).float().mean()))
    torch.testing.assert_close(captured.pop("head"), head_gradient, rtol=1e-4, atol=1e-6)
    assert_same(captured, gradients(plain))


def test_it_starts_at_zero_and_every_parameter_is_trained(tiny_base):
    model = RewardModel(tiny_base, LORA, seed=0)
    batch = make_reward_batch(make_rows(), tokens_per_microbatch=1000, device=CPU)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    first = reward_step(model, batch, optimizer, centering_coef=0.0, max_grad_norm=1.0)
    for _ in range(5):
        last = reward_step(model, batch, optimizer, centering_coef=0.0, max_grad_norm=1.0)

    assert first.metrics["loss/reward_model"] == pytest.approx(0.693147, abs=1e-6)
    assert last.metrics["loss/reward_model"] < 0.5
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    # the bias moves all scores alike, which without centering nothing asks for
    assert [name for name, is_moved in zip(names, moved, strict=True) if not is_moved] == ["value_head.bias"]


def scorer_of(base, folder, normalise, budget=40) -> RewardModelScorer:
    reward = TrainedReward(folder=folder, lora=replace(LORA, init_from=str(folder)), normalise=normalise)
    return RewardModelScorer("preference", base, reward, tokens_per_microbatch=budget)


def rollouts(rows):
    prompts = [Prompt(prompt_id=row.row_id, text="?", token_ids=row.prompt_token_ids) for row in rows]
    completions = [
        [
            Completion(
                token_ids=ids, sampling_logprobs=(0.0,) * len(ids), finish_reason="stop", seed=0, policy_version=0,
                adapter_fingerprint="f",
            )
            for ids in row.completions
        ]
        for row in rows
    ]  # fmt: skip
    return prompts, completions


def test_saved_and_loaded_it_scores_rollouts_as_it_scored_pairs(tiny_base, model, tmp_path):
    rows = make_rows()
    model.scale = (0.25, 2.0)
    model.save_adapter(tmp_path, "tiny")
    plain = plain_model(tiny_base)
    expected = torch.cat([plain_scores(plain, model.head, row) for row in rows]).detach()

    raw = scorer_of(tiny_base, tmp_path, "none").score(*rollouts(rows))
    scaled = scorer_of(tiny_base, tmp_path, "held_out").score(*rollouts(rows))

    assert [outcome.value for outcome in raw] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert [outcome.value for outcome in scaled] == pytest.approx(((expected - 0.25) / 2).tolist(), rel=1e-4, abs=1e-5)
    assert scaled[0].details["score"] == pytest.approx(raw[0].value)


def test_a_score_that_is_not_finite_is_an_error_never_a_zero(tiny_base, model, tmp_path):
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    model.save_adapter(tmp_path, "tiny")

    outcomes = scorer_of(tiny_base, tmp_path, "none").score(*rollouts(make_rows()))

    assert {(outcome.status, outcome.value) for outcome in outcomes} == {("error", None)}


def test_a_scale_that_it_does_not_have_is_named(tiny_base, model, tmp_path):
    model.save_adapter(tmp_path, "tiny")

    with pytest.raises(ValueError, match="rewards.components.preference.kwargs.normalise is held_out, but"):
        scorer_of(tiny_base, tmp_path, "held_out")
