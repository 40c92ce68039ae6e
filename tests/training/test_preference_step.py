"""The packed preference step against a plain one: PEFT, one padded row a completion, full logits, autograd."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlbench.config.preference import PREFERENCE_LOSSES, PreferenceConfig
from rlbench.config.schema import LoraConfig
from rlbench.data.preferences import PreferenceRow
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.models.policy import Policy
from rlbench.training.preference_step import (
    PreferenceBatch,
    held_out_preferences,
    make_batch,
    preference_step,
    reference_table,
    sequence_logps,
)
from tests.models.test_lora import gradients, randomise
from tests.training.test_step import make_policy

CPU = torch.device("cpu")


def make_rows(seed: int = 0, *, is_unpaired: bool = False) -> list[PreferenceRow]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(2, 98, (length,), generator=generator).tolist())

    return [
        PreferenceRow(
            row_id=str(i),
            prompt_token_ids=draw(1, 9),
            completions=(draw(1, 7), draw(1, 7)),
            is_desirable=i % 3 > 0 if is_unpaired else None,
        )
        for i in range(5)
    ]


class Capture(torch.optim.SGD):
    """Keeps the gradients of `policy` instead of making a step."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)
        self.policy = policy

    def step(self, closure=None):
        self.captured = gradients(self.policy.model)


def captured(policy, rows, config, budget, reference=None):
    optimizer = Capture(policy)
    batch = make_batch(rows, config, tokens_per_microbatch=budget, device=CPU)
    held_out = held_out_preferences(policy, batch, config, reference=reference)
    result = preference_step(policy, batch, optimizer, config, max_grad_norm=0, reference=reference)
    assert result.is_applied
    assert held_out == pytest.approx({k: result.metrics[k] for k in held_out}, rel=1e-5, abs=1e-6)
    return result.metrics, optimizer.captured, len(batch.microbatches)


def plain_model(base):
    model = add_lora(share_base(base), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    return model


def plain_logps(model, row: PreferenceRow, index: int) -> torch.Tensor:
    prompt, completion = row.prompt_token_ids, row.completions[index]
    token_ids = torch.tensor([[*prompt, *completion]])
    logprobs = model(input_ids=token_ids).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(-1, token_ids[0, 1:, None])[:, 0]
    return own[len(prompt) - 1 :].sum()


def plain_ratios(model, rows, index) -> torch.Tensor:
    ours = torch.stack([plain_logps(model, row, index) for row in rows])
    with model.disable_adapter(), torch.no_grad():
        reference = torch.stack([plain_logps(model, row, index) for row in rows])
    return ours - reference


def assert_same(ours, theirs):
    assert max(g.abs().max() for g in theirs.values()) > 1e-4
    for (name, grad), expected in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("budget", [1000, 24])
def test_dpo_has_the_gradients_of_the_plain_padded_step(tiny_base, budget):
    rows = make_rows()
    model = plain_model(tiny_base)
    expected = -F.logsigmoid(0.1 * (plain_ratios(model, rows, 0) - plain_ratios(model, rows, 1))).mean()
    expected.backward()

    metrics, grads, num_batches = captured(make_policy(tiny_base), rows, PreferenceConfig(), budget)

    assert num_batches == 1 if budget == 1000 else num_batches > 1
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same(grads, gradients(model))


@pytest.mark.parametrize("budget", [1000, 24])
def test_the_likelihood_is_a_mean_over_the_tokens_of_the_chosen_completions(tiny_base, budget):
    rows, model = make_rows(), plain_model(tiny_base)
    num_tokens = sum(len(row.completions[0]) for row in rows)
    assert num_tokens != sum(len(row.completions[1]) for row in rows)
    expected = -torch.stack([plain_logps(model, row, 0) for row in rows]).sum() / num_tokens
    expected.backward()

    metrics, ours, _ = captured(make_policy(tiny_base), rows, PreferenceConfig(losses=["sft"]), budget)

    assert metrics["loss/preference"] == pytest.approx(expected.item(), rel=1e-4)
    assert_same(ours, gradients(model))


@pytest.mark.parametrize("budget", [1000, 24])
def test_kto_has_the_gradients_of_the_plain_step_with_its_mismatched_kl(tiny_base, budget):
    rows = make_rows(2, is_unpaired=True)
    model = plain_model(tiny_base)
    kl = plain_ratios(model, rows, 1).mean().clamp(min=0).detach()
    sign = torch.tensor([1.0 if row.is_desirable else -1.0 for row in rows])
    expected = (1 - torch.sigmoid(0.1 * sign * (plain_ratios(model, rows, 0) - kl))).mean()
    expected.backward()

    metrics, grads, _ = captured(make_policy(tiny_base), rows, PreferenceConfig(losses=["kto"]), budget)

    assert metrics["kl/mismatch"] == pytest.approx(kl.item(), rel=1e-4) and kl > 0
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same(grads, gradients(model))


@pytest.mark.parametrize("label", [True, False])
def test_a_step_of_one_label_has_no_mean_of_the_other(tiny_base, label):
    policy = make_policy(tiny_base)
    rows = [replace(row, is_desirable=label) for row in make_rows(is_unpaired=True)]

    metrics, *_ = captured(policy, rows, PreferenceConfig(losses=["kto"]), 20)

    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"preference/{present}" in metrics and f"preference/{absent}" not in metrics
    assert "preference/margin" not in metrics and "preference/accuracy" in metrics


def test_a_loss_that_sorts_the_whole_step_does_not_depend_on_the_split(tiny_base):
    rows = make_rows(2)
    config = PreferenceConfig(losses=["aot_unpaired"], label_smoothing=0.1)
    model = plain_model(tiny_base)
    chosen, rejected = (plain_ratios(model, rows, index).sort().values for index in (0, 1))
    z = 0.1 * (chosen - rejected)
    expected = (-0.9 * F.logsigmoid(z) - 0.1 * F.logsigmoid(-z)).mean()
    expected.backward()

    for budget in (1000, 24):
        metrics, grads, _ = captured(make_policy(tiny_base), rows, config, budget)
        assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
        assert_same(grads, gradients(model))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_reference_computed_before_changes_nothing(tiny_base, name):
    config = PreferenceConfig(losses=[name], wpo=name == "sigmoid")
    rows = make_rows(3, is_unpaired=config.is_unpaired)
    policy = make_policy(tiny_base)
    table = reference_table(policy, rows, is_base=True, tokens_per_microbatch=40)

    without, grads, _ = captured(policy, rows, config, 40)
    with_table, same_grads, _ = captured(policy, rows, config, 40, reference=table)

    assert with_table == pytest.approx(without, rel=1e-4, abs=1e-5)
    for key in grads:
        torch.testing.assert_close(same_grads[key], grads[key], rtol=1e-3, atol=1e-5)


def test_no_reference_forward_is_made_where_no_loss_needs_it(tiny_base, monkeypatch):
    policy = make_policy(tiny_base)
    monkeypatch.setattr(policy, "reference", lambda: pytest.fail("a reference forward was made"))

    captured(policy, make_rows(), PreferenceConfig(losses=["orpo"]), 1000)


def test_against_the_starting_policy_the_loss_begins_at_log_2(tiny_base):
    policy, rows = make_policy(tiny_base), make_rows()
    table = reference_table(policy, rows, is_base=False, tokens_per_microbatch=1000)

    metrics, _, _ = captured(policy, rows, PreferenceConfig(), 1000, reference=table)

    assert metrics["loss/total"] == pytest.approx(0.693147, abs=1e-5)


def test_the_prompt_of_a_pair_is_forwarded_once(tiny_base):
    (row,) = make_rows()[:1]
    batch = make_batch([row], PreferenceConfig(), tokens_per_microbatch=100, device=CPU)

    assert len(batch.microbatches[0].token_ids) == len(row.prompt_token_ids) + sum(len(c) - 1 for c in row.completions)
    ours = sequence_logps(make_policy(tiny_base), batch.microbatches[0])
    model = plain_model(tiny_base)
    torch.testing.assert_close(ours, torch.stack([plain_logps(model, row, i) for i in (0, 1)]), rtol=1e-5, atol=1e-5)


def test_a_row_that_a_step_holds_twice_is_never_cut_from_its_pair():
    rows = make_rows()[:2] * 2
    budget = max(len(r.prompt_token_ids) + sum(len(c) - 1 for c in r.completions) for r in rows)

    batch = make_batch(rows, PreferenceConfig(), tokens_per_microbatch=budget, device=CPU)

    for microbatch in batch.microbatches:
        pairs = zip(microbatch.samples[::2], microbatch.samples[1::2], strict=True)
        assert all(chosen.group_id == rejected.group_id for chosen, rejected in pairs)
    assert sum(m.num_sequences for m in batch.microbatches) == 8


def test_wpo_weights_are_those_of_full_logits(tiny_base):
    rows, model = make_rows(), plain_model(tiny_base)
    expected = torch.zeros(())
    for row in rows:
        log_weight = torch.zeros(())
        for completion in row.completions:
            token_ids = torch.tensor([[*row.prompt_token_ids, *completion]])
            with torch.no_grad():
                logprobs = model(input_ids=token_ids).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
            own = logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            log_weight = log_weight + (own - (2 * logprobs).logsumexp(-1)).mean()
        expected = expected + log_weight.exp() / len(rows)

    metrics, _, _ = captured(make_policy(tiny_base), rows, PreferenceConfig(wpo=True), 24)

    assert metrics["preference/wpo_weight"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("budget", [1000, 24])
def test_under_dropout_both_forwards_of_the_whole_step_have_the_same_masks(tiny_base, budget, monkeypatch):
    """The gradient is that of the one forward, though the first of the two has none."""

    def of_step():
        policy = Policy(tiny_base, LoraConfig(rank=4, alpha=8, dropout=0.3), seed=0)
        randomise(policy.model)
        batch = make_batch(make_rows(), PreferenceConfig(), tokens_per_microbatch=budget, device=CPU)
        optimizer = Capture(policy)
        preference_step(policy, batch, optimizer, PreferenceConfig(), max_grad_norm=0, reference=None)
        return optimizer.captured

    expected = of_step()
    monkeypatch.setattr(PreferenceBatch, "pairs_by_microbatch", lambda _: None)
    assert_same(of_step(), expected)
