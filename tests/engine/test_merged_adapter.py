"""What an engine with a merged adapter samples from, and that other contents of its copies are seen.

The whole engine contract with merged copies is in `test_contract.py`.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlbench.engine.dense_copies import DenseCopies, LinearLayer
from rlbench.engine.interface import Adapter, EngineCorruptedError
from rlbench.engine.merged_adapter import MergedAdapter
from rlbench.engine.vllm_checks import check_formats
from rlbench.models.shared_base import EngineWeight
from rlbench.records import SamplingParams
from tests.engine.cpu_merged import merges_on_cpu
from tests.engine.factories import start_vllm

pytestmark = pytest.mark.usefixtures("one_thread")
A, B = "0123456789abcdef", "fedcba9876543210"  # fingerprints
SCALING = 0.5


@pytest.fixture
def merged():
    """Two matrices in one layer, one in another; an adapter on the first and the last."""
    torch.manual_seed(0)
    fused, single = nn.Module(), nn.Module()
    bases = torch.randn(48, 32).bfloat16(), torch.randn(24, 16).bfloat16()
    layers = [
        LinearLayer(fused, EngineWeight(bases[0]), (("q_proj", 32), ("k_proj", 16)), 32),
        LinearLayer(single, EngineWeight(bases[1]), (("o_proj", 24),), 16),
    ]
    merged = MergedAdapter(DenseCopies(layers, torch.bfloat16))
    merged.use(with_adapter=False)
    copies = fused.rlbench_dense, single.rlbench_dense
    return SimpleNamespace(merged=merged, copies=copies, bases=bases)


def adapter(seed: int = 1, rank: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (32, 32), "o_proj": (24, 16)}
    lora_a = {name: torch.randn(rank, depth, generator=generator) for name, (_, depth) in shapes.items()}
    return lora_a, {name: torch.randn(rows, rank, generator=generator) for name, (rows, _) in shapes.items()}


def test_copies_hold_base_plus_scaled_product_of_the_adapted_parts_alone(merged):
    lora_a, lora_b = adapter()
    merged.merged.load(lora_a, lora_b, SCALING, A)
    merged.merged.use(with_adapter=True)

    fused, single = merged.copies
    for copy, base, name in ((fused[:32], merged.bases[0][:32], "q_proj"), (single, merged.bases[1], "o_proj")):
        low_rank = (SCALING * lora_b[name]).bfloat16().double() @ lora_a[name].bfloat16().double()
        exact = base.double() + low_rank
        assert ((copy.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-6).all()
        assert not torch.equal(copy, base)
    assert torch.equal(fused[32:], merged.bases[0][32:])


def test_the_base_comes_back_and_so_do_the_merged_bits(merged):
    merged.merged.load(*adapter(), SCALING, A)
    merged.merged.use(with_adapter=True)
    first = [copy.clone() for copy in merged.copies]

    merged.merged.use(with_adapter=False)
    assert all(torch.equal(copy, base) for copy, base in zip(merged.copies, merged.bases, strict=True))
    merged.merged.use(with_adapter=True)
    assert all(torch.equal(copy, old) for copy, old in zip(merged.copies, first, strict=True))


def test_a_new_adapter_is_merged_into_the_base_and_not_into_the_last_one(merged):
    merged.merged.load(*adapter(1), SCALING, A)
    merged.merged.use(with_adapter=True)
    merged.merged.load(*adapter(2), SCALING, B)
    merged.merged.use(with_adapter=True)
    found = [copy.clone() for copy in merged.copies]

    merged.merged.forget()
    for copy in merged.copies:
        copy.fill_(torch.nan)
    merged.merged.use(with_adapter=True)

    assert all(torch.equal(copy, old) for copy, old in zip(merged.copies, found, strict=True))
    assert merged.merged.num_differing() == 0


def test_copies_are_written_when_their_content_changes_alone(merged, monkeypatch):
    fill, written = merged.merged.copies.fill, []
    monkeypatch.setattr(
        merged.merged.copies, "fill", lambda *given: (written.append(given[0] is not None), fill(*given))
    )
    merged.merged.use(with_adapter=False)
    merged.merged.load(*adapter(), SCALING, A)
    for _ in range(3):
        merged.merged.use(with_adapter=True)
    merged.merged.use(with_adapter=False)

    assert written == [True, False]


def test_the_rounding_follows_the_fingerprint(merged):
    found = []
    for fingerprint in (A, B):
        merged.merged.load(*adapter(), SCALING, fingerprint)
        merged.merged.use(with_adapter=True)
        found.append(merged.copies[0].clone())

    assert not torch.equal(*found)


def test_an_adapter_of_another_rank_and_fewer_layers_leaves_nothing_of_the_last(merged):
    merged.merged.load(*adapter(), SCALING, A)
    lora_a, lora_b = adapter(rank=2)
    merged.merged.load({"q_proj": lora_a["q_proj"]}, {"q_proj": lora_b["q_proj"]}, 1.0, B)
    merged.merged.use(with_adapter=True)

    held_a, held_b = merged.merged.held()
    assert set(held_a) == set(held_b) == {"q_proj"}
    assert torch.equal(held_a["q_proj"], lora_a["q_proj"].bfloat16())
    assert torch.equal(merged.copies[1], merged.bases[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.copies[0][40, 3].add_(0.1),
        lambda m: m.copies[1].fill_(torch.nan),
        lambda m: m.merged.load(*adapter(3), SCALING, A),  # the policy moved on, the copies did not
        lambda m: m.copies[0].copy_(m.bases[0]),  # the base alone
        lambda m: m.bases[0][0].neg_(),
    ],
)
def test_other_contents_are_seen(merged, damage):
    merged.merged.load(*adapter(), SCALING, A)
    merged.merged.use(with_adapter=True)
    assert merged.merged.num_differing() == 0

    damage(merged)

    assert merged.merged.num_differing() > 0


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[SimpleNamespace]:
    with merges_on_cpu():
        engine = start_vllm(tiny, dtype="bfloat16", dense_copies="merged")
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    yield SimpleNamespace(engine=engine, merged=worker.rlbench_merged, version=0)
    engine.close()


def sync(engine, adapter: Adapter) -> None:
    engine.version += 1
    engine.engine.sync(adapter, engine.version)


def generate(engine):
    return engine.engine.generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=8), list(range(4)))


def test_an_engine_whose_copies_were_not_refilled_says_so(engine, tiny, monkeypatch):
    sync(engine, tiny.make_adapter(1))
    generate(engine)
    monkeypatch.setattr(engine.merged.copies, "fill", lambda *arguments: None)  # a refill that does nothing
    sync(engine, tiny.make_adapter(2))

    with pytest.raises(EngineCorruptedError, match=f"not its base with adapter {engine.engine.adapter_fingerprint}"):
        generate(engine)


def test_rollouts_come_from_the_adapter_that_was_synced_last(engine, tiny):
    rows = []
    for seed in (1, 2, 1):
        sync(engine, tiny.make_adapter(seed))
        rows.append([c.token_ids for c in generate(engine)])
        assert {c.adapter_fingerprint for c in generate(engine)} == {tiny.make_adapter(seed).fingerprint()}

    assert rows[0] == rows[2] != rows[1]


def test_an_update_far_below_a_bfloat16_step_moves_the_logprobs(engine, tiny):
    """After one step of AdamW B is as large as the learning rate: rounded to nearest, nothing of it would be left."""
    full = tiny.make_adapter(1)
    small = Adapter(lora_a=full.lora_a, lora_b={n: b * 0.002 for n, b in full.lora_b.items()}, scaling=full.scaling)
    name = "model.layers.0.mlp.down_proj"
    base = tiny.model.get_submodule(name).weight.bfloat16()
    nearest = base + (small.scaling * small.lora_b[name] @ small.lora_a[name]).bfloat16()
    kept = (nearest == base).float().mean()
    sync(engine, small)
    prompts, tokens = [[5, 6, 7]] * 4, [[8, 9, 10, 11]] * 4
    found = torch.tensor(engine.engine.score(prompts, tokens)[0])
    without = torch.tensor(engine.engine.score(prompts, tokens, use_adapter=False)[0])

    assert kept > 0.5
    assert (found - without).abs().max() > 1e-3


def test_moving_on_from_base_scores_restores_the_adapter(engine, tiny):
    sync(engine, tiny.make_adapter(3))
    before = [c.token_ids for c in generate(engine)]

    engine.engine.score([[5, 6, 7]], [[8, 9]], use_adapter=False)
    assert [c.token_ids for c in generate(engine)] == before
    engine.engine.sleep()
    engine.engine.wake()
    assert [c.token_ids for c in generate(engine)] == before


@pytest.mark.parametrize(
    ("kind", "changed", "found"),
    [
        ("merged", {"device": "cpu"}, "found cpu"),
        ("merged", {"dtype": "float16"}, "model.dtype=float16"),
        ("merged", {"quantization": "fp8", "device": "cpu"}, "model.quantization=fp8"),
        ("merged", {"has_adapter": False}, "all weights trained"),
        ("base", {"quantization": "none"}, "an NF4 base"),
    ],
)
def test_copies_that_cannot_be_are_refused_before_vllm_starts(kind, changed, found):
    possible = {"device": "cuda", "dtype": "bfloat16", "quantization": "nf4", "has_adapter": True}
    check_formats(**possible, dense_copies=kind)

    with pytest.raises(ValueError, match=f"engine.dense_copies is {kind}, .*{found}"):
        check_formats(**{**possible, **changed}, dense_copies=kind)
