"""Sums of bytes: by hand, over chunks, and what they tell apart."""

import pytest
import torch

from rlbench.models import word_sums
from rlbench.models.word_sums import placed_word_sums, word_sum


def test_both_sums_by_hand_modulo_2_to_the_64():
    words = torch.tensor([3, 5, 2**62, -1], dtype=torch.int64)

    assert int(word_sum(words)) == 3 + 5 + 2**62 - 1
    wanted = (3 * 1 + 5 * 3 + 2**62 * 5 - 7) % 2**64
    assert placed_word_sums([words])[0] % 2**64 == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_chunks_and_odd_lengths_change_nothing(dtype, monkeypatch):
    tensor = (torch.rand(37, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    whole = placed_word_sums([tensor, tensor[:0]])

    monkeypatch.setattr(word_sums, "_CHUNK", 4)

    assert placed_word_sums([tensor, tensor[:0]]) == whole


def test_numbers_that_swap_places_are_seen_by_place_alone():
    tensor = torch.arange(8.0, dtype=torch.float64)
    swapped = tensor[[0, 5, 2, 3, 4, 1, 6, 7]]

    assert torch.equal(word_sum(tensor), word_sum(swapped))
    assert placed_word_sums([tensor]) != placed_word_sums([swapped])


def test_where_in_a_storage_a_tensor_begins_changes_nothing():
    storage = torch.arange(18, dtype=torch.float32)
    view, copy = storage[1:17], storage[1:17].clone()

    assert placed_word_sums([view]) == placed_word_sums([copy])
    assert torch.equal(word_sum(view), word_sum(copy))


def test_the_factors_are_made_once_for_all_tensors(monkeypatch):
    made, arange = [], torch.arange
    monkeypatch.setattr(torch, "arange", lambda *bounds, **options: made.append(bounds) or arange(*bounds, **options))

    placed_word_sums([torch.ones(4), torch.ones(6), torch.ones(8)])

    assert len(made) == 1  # each takes 8 MiB
