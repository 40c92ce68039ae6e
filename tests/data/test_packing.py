"""Packing keeps every token, shares prompts, holds the budget."""

import pytest
import torch

from rlbench.data.packing import num_packed_tokens, pack
from rlbench.records import TrainingSample


def make_sample(group: str, prompt: list[int], completion: list[int], advantage: float = 1.0) -> TrainingSample:
    n = len(completion)
    return TrainingSample(
        group_id=group,
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(completion),
        sampling_logprobs=tuple(-0.1 * t for t in completion),
        advantages=(advantage,) * n,
        loss_mask=(True,) * n,
    )


def test_a_group_is_laid_out_as_one_prompt_and_completions_without_their_last_token():
    samples = [make_sample("a", [1, 2, 3], [4, 5]), make_sample("a", [1, 2, 3], [6]), make_sample("b", [7], [8, 9, 10])]

    (batch,) = pack(samples, tokens_per_microbatch=100, device="cpu")

    assert batch.token_ids.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 10]
    assert batch.predict_rows.tolist() == [2, 3, 2, 4, 5, 6]
    assert (batch.num_prompt_tokens, batch.num_completion_tokens) == (4, 6)


def test_the_mask_lets_a_completion_see_its_prompt_and_its_own_past_only():
    samples = [make_sample("a", [1, 2], [3, 4, 5]), make_sample("b", [6, 7, 8], [9, 10])]

    (batch,) = pack(samples, tokens_per_microbatch=100, device="cpu")
    layout = batch.layout.padded()

    for completion, seen in ((0, [[0, 1, 2], [0, 1, 2, 3]]), (1, [[4, 5, 6, 7]])):
        for token, expected in enumerate(seen):
            attended = layout.key_rows[completion][layout.completion_mask()[completion, token]]
            assert attended.tolist() == expected


def test_every_completion_token_appears_once_whatever_the_budget():
    samples = [make_sample(f"g{i}", [i] * (3 + i), [100 * i + j] * (2 + j)) for i in range(4) for j in range(5)]
    expected = sorted(t for s in samples for t in s.token_ids)

    for budget in (12, 20, 33, 1000):
        batches = pack(samples, tokens_per_microbatch=budget, device="cpu")

        assert sorted(t for b in batches for t in b.targets.tolist()) == expected
        assert max(len(b.token_ids) for b in batches) <= budget


def test_microbatches_are_balanced():
    samples = [make_sample(f"g{i}", [1] * 10, [2] * 11) for i in range(9)]

    sizes = [len(b.token_ids) for b in pack(samples, tokens_per_microbatch=65, device="cpu")]

    assert sizes == [60, 60, 60]


def test_the_microbatch_with_most_tokens_comes_first():
    samples = [make_sample(f"g{i}", [1] * 10, [2] * length) for i, length in enumerate([20, 31, 26, 41, 22])]

    sizes = [len(b.token_ids) for b in pack(samples, tokens_per_microbatch=64, device="cpu")]

    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_a_sample_longer_than_the_budget_is_a_clear_error():
    with pytest.raises(ValueError, match=r"training.tokens_per_microbatch is 5, .* group a has 6 tokens \(prompt 3"):
        pack([make_sample("a", [1, 2, 3], [4] * 4)], tokens_per_microbatch=5, device="cpu")


def test_the_loss_columns_follow_the_targets():
    samples = [make_sample("a", [1], [2, 3], advantage=0.5), make_sample("a", [1], [4], advantage=-1.0)]

    (batch,) = pack(samples, tokens_per_microbatch=100, device="cpu")

    assert batch.advantages.tolist() == [0.5, 0.5, -1.0]
    torch.testing.assert_close(batch.sampling_logprobs, torch.tensor([-0.2, -0.3, -0.4]))
    assert num_packed_tokens(samples) == len(batch.token_ids)
