"""Adapters merged into weights: PEFT's sums, what each way of rounding keeps, and which bits it writes."""

import copy
import math

import pytest
import torch
from peft import PeftModel

from rlbench.config.schema import LoraConfig
from rlbench.models.adapter import Adapter
from rlbench.models.merge import Rounding, Survival, merge_, round_
from rlbench.models.policy import Policy
from tests.models.random_base import random_base
from tests.models.test_lora import randomise

FLOAT32 = Rounding(dtype=torch.float32)
NEAREST = Rounding(dtype=torch.bfloat16)
NAME = "model.layers.1.mlp.down_proj"


def stochastic(fingerprint: str) -> Rounding:
    return Rounding(dtype=torch.bfloat16, is_stochastic=True, fingerprint=fingerprint)


def bfloat16_base(**options):
    """Numbers of bfloat16, held in float32, as what a run in bfloat16 trains on."""
    base = random_base("llama", tie_word_embeddings=False, **options)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.bfloat16())
    return base


def adapter_of(base, scale: float = 0.1, **lora) -> Adapter:
    policy = Policy(base, LoraConfig(**{"rank": 4, "alpha": 8, **lora}), seed=0)
    randomise(policy.model)
    adapter = policy.adapter()
    return Adapter(
        lora_a=adapter.lora_a, lora_b={n: b * scale for n, b in adapter.lora_b.items()}, scaling=adapter.scaling
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"targets": "q_proj,down_proj"}], ids=str)
def test_float32_weights_are_those_of_pefts_merge_and_unload(family, lora, tmp_path):
    base = random_base(family)
    policy = Policy(base, LoraConfig(rank=4, alpha=6, **lora), seed=0)
    randomise(policy.model)
    policy.save_adapter(tmp_path, "base")
    adapter = policy.adapter()
    expected = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).merge_and_unload()

    merged = copy.deepcopy(base)
    found = merge_(merged, adapter, FLOAT32)
    round_(merged, adapter, FLOAT32)

    theirs, before = dict(expected.named_parameters()), dict(base.named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(weight, before[name]) != (name.removesuffix(".weight") in adapter.lora_a), name
    assert found.share == pytest.approx(1, abs=1e-5) and found.relative_error < 1e-4


def test_a_tiny_change_is_lost_to_nearest_and_kept_in_expectation_by_stochastic_rounding():
    base = bfloat16_base()
    adapter = adapter_of(base, scale=5e-4)
    before = base.get_submodule(NAME).weight.clone()
    change = adapter.scaling * adapter.lora_b[NAME] @ adapter.lora_a[NAME]
    assert (change.abs() < before.abs() * 2**-9).float().mean() > 0.95  # below half a step
    drawn = []
    for number in range(200):
        merged = copy.deepcopy(base)
        rounding = stochastic(f"{number:016x}")
        found = merge_(merged, adapter, rounding)
        round_(merged, adapter, rounding)
        drawn.append(merged.get_submodule(NAME).weight - before)
        assert found.share == pytest.approx(1, abs=0.15) and found.relative_error > 3
    mean = torch.stack(drawn).mean(0)  # its noise is 1 / sqrt(200) of a draw's

    nearest = merge_(copy.deepcopy(base), adapter, NEAREST)

    assert nearest.share < 0.3 and nearest.relative_error > 0.7
    assert float((mean * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.02)
    assert (mean - change).norm() < 0.1 * (drawn[0] - change).norm()


@pytest.mark.parametrize("rounding", [NEAREST, stochastic("9f2c01aa83b1d07e")], ids=["nearest", "stochastic"])
def test_what_is_measured_is_what_is_written_to_a_neighbour_of_the_sum(rounding, monkeypatch):
    monkeypatch.setattr("rlbench.models.merge._NUMBERS", 640)  # several parts of each matrix
    base = bfloat16_base()
    adapter = adapter_of(base)
    before = {name: base.get_submodule(name).weight.clone() for name in adapter.lora_a}
    found, again = merge_(base, adapter, rounding), Survival()
    exact = {name: base.get_submodule(name).weight.clone() for name in adapter.lora_a}
    round_(base, adapter, rounding)

    for name, total in exact.items():
        written = base.get_submodule(name).weight
        assert torch.equal(written, written.bfloat16().float())
        steps = (written - total).abs() / torch.exp2(torch.floor(torch.log2(total.abs())) - 7)
        assert steps.max() <= (1 if rounding.is_stochastic else 0.5)
        if rounding is NEAREST:
            assert torch.equal(written, total.bfloat16().float())
        again.add(adapter.scaling * adapter.lora_b[name] @ adapter.lora_a[name], written - before[name])
    assert again.share == pytest.approx(found.share, rel=1e-6)
    assert again.relative_error == pytest.approx(found.relative_error, rel=1e-6)


def test_draws_are_those_of_the_fingerprint_and_differ_between_matrices_and_parts(monkeypatch):
    values = torch.full((64, 64), 1 + 2**-9)  # a quarter of the way to the next number
    first = stochastic("aa")(values, "q_proj", 0)

    assert torch.equal(first, stochastic("aa")(values, "q_proj", 0))
    assert (first > 1).float().mean() == pytest.approx(0.25, abs=0.03)
    for other in (stochastic("ab")(values, "q_proj", 0), stochastic("aa")(values, "k_proj", 0),
                  stochastic("aa")(values, "q_proj", 64)):  # fmt: skip
        assert 0.2 < (other != first).float().mean() < 0.55


def test_weights_without_a_change_keep_their_bits():
    base = bfloat16_base()
    adapter = adapter_of(base, scale=0.0)
    before = copy.deepcopy(base.state_dict())
    found = merge_(base, adapter, stochastic("aa"))
    round_(base, adapter, stochastic("aa"))

    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert math.isnan(found.share) and math.isnan(found.relative_error)


def test_survival_by_hand():
    found = Survival()
    found.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
    found.add(torch.tensor([[0.0, 5.0]]), torch.tensor([[2.0, 5.0]]))

    assert found.share == pytest.approx((16 + 25) / 50)
    assert found.relative_error == pytest.approx(math.sqrt((9 + 4) / 50))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_is_merged_unless_it_is_the_embedding_too(is_tied):
    base = random_base("llama", tie_word_embeddings=is_tied)
    adapter = Adapter(lora_a={"lm_head": torch.ones(1, 64)}, lora_b={"lm_head": torch.ones(98, 1)}, scaling=0.5)
    before = base.lm_head.weight.clone()
    if is_tied:
        with pytest.raises(ValueError, match="lm_head, whose weight is that of the embedding too"):
            merge_(base, adapter, FLOAT32)
        assert torch.equal(base.lm_head.weight, before)
        return
    merge_(base, adapter, FLOAT32)

    torch.testing.assert_close(base.lm_head.weight, before + 0.5)


def test_an_adapter_of_another_model_is_refused():
    adapter = Adapter(lora_a={"lm_head": torch.ones(1, 32)}, lora_b={"lm_head": torch.ones(98, 1)}, scaling=0.5)

    with pytest.raises(ValueError, match="adapter of lm_head: A and B have shapes"):
        merge_(random_base("llama", tie_word_embeddings=False), adapter, FLOAT32)
