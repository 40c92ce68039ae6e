"""Pairs of rollouts, each completion forwarded once, against the offline step on the same pairs written out as rows."""

from itertools import permutations

import pytest
import torch

from rlbench.algorithms.preference_losses import PREFERENCE_LOSSES, PairInputs
from rlbench.config.preference import PreferenceConfig
from rlbench.data.preferences import PreferenceRow
from rlbench.training.pair_update import PairOptions, make_pair_batches, update_on_pairs
from rlbench.training.preference_step import make_batch, preference_step
from tests.models.test_lora import gradients
from tests.training.test_preference_step import CPU, assert_same, plain_logps, plain_model
from tests.training.test_step import make_policy, make_samples

SAMPLES = make_samples()  # three groups of four
BEST = [(0, 3), (5, 4), (10, 9)]
EVERY = [
    (4 * group + i, 4 * group + j) for group in range(3) for i, j in permutations(range(4), 2) if (i * 7) % 5 > j % 3
]
ONCE = PairOptions(num_updates=1, temperature=1.0, max_grad_norm=0)


class Capture(torch.optim.SGD):
    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)
        self.model, self.captured = policy.model, []

    def step(self, closure=None):
        self.captured.append(gradients(self.model))


def rows_of(pairs) -> list[PreferenceRow]:
    return [
        PreferenceRow(
            row_id=f"{chosen}-{rejected}",
            prompt_token_ids=SAMPLES[chosen].prompt_token_ids,
            completions=(SAMPLES[chosen].token_ids, SAMPLES[rejected].token_ids),
        )
        for chosen, rejected in pairs
    ]


def online(policy, pairs, config, budget, options=ONCE, num_minibatches=1, optimizer=None):
    used = sorted({place for pair in pairs for place in pair})
    place_of = {place: index for index, place in enumerate(used)}
    batches = make_pair_batches(
        [SAMPLES[place] for place in used],
        [(place_of[chosen], place_of[rejected]) for chosen, rejected in pairs],
        num_minibatches=num_minibatches,
        tokens_per_microbatch=budget,
        device=CPU,
    )
    optimizer = optimizer or Capture(policy)
    result = update_on_pairs(policy, batches, optimizer, config, options)
    return result, getattr(optimizer, "captured", []), batches


def offline(policy, pairs, config, budget):
    optimizer = Capture(policy)
    batch = make_batch(rows_of(pairs), config, tokens_per_microbatch=budget, device=CPU)
    result = preference_step(policy, batch, optimizer, config, max_grad_norm=0, reference=None)
    return result.metrics, optimizer.captured[0]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize(("pairs", "budget"), [(BEST, 200), (EVERY, 200), (EVERY, 24)], ids=["best", "all", "cut"])
def test_the_gradient_is_that_of_the_offline_step_on_the_same_pairs(tiny_base, name, pairs, budget):
    config = PreferenceConfig(losses=[name], wpo=name == "sigmoid")
    policy = make_policy(tiny_base)

    result, captured, batches = online(policy, pairs, config, budget)
    metrics, expected = offline(policy, pairs, config, 200)

    assert (batches[0].pairs_by_microbatch() is None) == (budget == 24)
    shared = {key: value for key, value in metrics.items() if not key.startswith("optim/")}
    assert {key: result.metrics[key] for key in shared} == pytest.approx(shared, rel=1e-5, abs=1e-5)
    for key, gradient in expected.items():
        torch.testing.assert_close(captured[0][key], gradient, rtol=1e-5, atol=1e-5)
    assert_same(captured[0], expected)


def test_the_loss_is_that_of_the_table_on_plain_logprobs(tiny_base):
    config, model = PreferenceConfig(losses=["ipo"], beta=0.3), plain_model(tiny_base)
    rows = rows_of(EVERY)
    columns = []
    for index in (0, 1):
        with torch.no_grad():
            ours = torch.stack([plain_logps(model, row, index) for row in rows])
            with model.disable_adapter():
                columns.append((ours, torch.stack([plain_logps(model, row, index) for row in rows])))
    (chosen, ref_chosen), (rejected, ref_rejected) = columns
    inputs = PairInputs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_scores=chosen - ref_chosen,
        rejected_scores=rejected - ref_rejected,
        chosen_lengths=torch.tensor([float(len(row.completions[0])) for row in rows]),
        rejected_lengths=torch.tensor([float(len(row.completions[1])) for row in rows]),
        num_pairs=len(rows),
        num_chosen_tokens=sum(len(row.completions[0]) for row in rows),
    )

    result, _, _ = online(make_policy(tiny_base), EVERY, config, 40)

    expected = PREFERENCE_LOSSES["ipo"](inputs, beta=0.3).mean().item()
    assert result.metrics["loss/total"] == pytest.approx(expected, rel=1e-4)
    used = {place for pair in EVERY for place in pair}
    num_tokens = sum(len(SAMPLES[place].token_ids) for place in used)
    ratio = {pair[i]: (columns[i][0] - columns[i][1])[n] for n, pair in enumerate(EVERY) for i in (0, 1)}
    kl = sum(float(ratio[place]) for place in used) / num_tokens
    assert result.metrics["kl/reference"] == pytest.approx(kl, rel=1e-4)


def test_a_completion_is_forwarded_once_however_many_pairs_it_is_in(tiny_base):
    _, _, (batch,) = online(make_policy(tiny_base), EVERY, PreferenceConfig(), 200)
    used = {place for pair in EVERY for place in pair}
    prompts = {SAMPLES[place].group_id: SAMPLES[place].prompt_token_ids for place in used}

    assert len(EVERY) > len(used) / 2
    assert sum(len(microbatch.token_ids) for microbatch in batch.microbatches) == sum(
        len(ids) for ids in prompts.values()
    ) + sum(len(SAMPLES[place].token_ids) - 1 for place in used)


def test_logprobs_are_taken_at_the_temperature_of_sampling(tiny_base):
    policy = make_policy(tiny_base)
    options = PairOptions(num_updates=1, temperature=0.5, max_grad_norm=0)

    result, _, (batch,) = online(policy, BEST, PreferenceConfig(), 200, options)

    with torch.no_grad():
        logits = policy.hidden(batch.microbatches[0]).float() @ policy.head_weight.float().T / 0.5
    expected = logits.log_softmax(-1).gather(-1, batch.microbatches[0].targets[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs[0], expected, rtol=1e-4, atol=1e-4)


def tempered(model, pairs, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of logprobs of the completions [P, 2], and means of the tokens' log weights of WPO [P, 2]."""
    sums, weights = [], []
    for row in rows_of(pairs):
        for completion in row.completions:
            token_ids = torch.tensor([[*row.prompt_token_ids, *completion]])
            logits = model(input_ids=token_ids).logits[0, -len(completion) - 1 : -1] / temperature
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            sums.append(own.sum())
            weights.append((own - (2 * logprobs).logsumexp(-1)).mean())
    return torch.stack(sums).view(-1, 2), torch.stack(weights).view(-1, 2)


@pytest.mark.parametrize("budget", [200, 24], ids=["whole", "cut"])
@pytest.mark.parametrize("wpo", [False, True])
def test_policy_reference_and_weights_are_all_taken_at_the_temperature_of_sampling(tiny_base, budget, wpo):
    model, temperature, pairs = plain_model(tiny_base), 0.6, EVERY
    logps, log_weights = tempered(model, pairs, temperature)
    with model.disable_adapter(), torch.no_grad():
        ref_logps, _ = tempered(model, pairs, temperature)
    margins = ((logps - ref_logps) * torch.tensor([1.0, -1.0])).sum(1)
    weights = 1000 * log_weights.sum(1).exp().detach() if wpo else torch.ones(len(pairs))
    expected = (-torch.nn.functional.logsigmoid(0.1 * margins) * weights).mean()
    expected.backward()

    options = PairOptions(num_updates=1, temperature=temperature, max_grad_norm=0)
    config = PreferenceConfig(wpo=wpo, loss_weights=[1000.0 if wpo else 1.0])
    result, (ours,), _ = online(make_policy(tiny_base), pairs, config, budget, options)

    assert result.metrics["loss/preference"] == pytest.approx(expected.item(), rel=1e-4)
    assert_same(ours, gradients(model))


def test_several_updates_go_round_the_minibatches_against_one_reference(tiny_base):
    policy = make_policy(tiny_base)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    options = PairOptions(num_updates=6, temperature=1.0, max_grad_norm=1.0)

    result, _, batches = online(policy, BEST, PreferenceConfig(), 200, options, 3, optimizer)
    after, _, _ = online(policy, BEST, PreferenceConfig(), 200)

    assert [len(batch.pairs) for batch in batches] == [1, 1, 1] and result.num_applied == 6
    assert after.metrics["preference/margin"] > result.metrics["preference/margin"]


def test_a_gradient_that_is_not_finite_ends_the_updates(tiny_base):
    policy = make_policy(tiny_base)
    with torch.no_grad():
        policy.parameters()[0].fill_(float("inf"))

    result, captured, _ = online(policy, BEST, PreferenceConfig(), 200, PairOptions(
        num_updates=3, temperature=1.0, max_grad_norm=1.0))  # fmt: skip

    assert not result.is_finite and result.num_applied == 0 and not captured
