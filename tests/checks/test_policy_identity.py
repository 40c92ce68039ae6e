"""The proof's pieces: version and fingerprint, the probe, verdicts, due steps, exact comparison of weights."""

import pytest
import torch

from rlbench.checks.limits import Gap
from rlbench.checks.policy_identity import (
    PolicyIdentity,
    PolicyIdentityError,
    Proof,
    check_completions,
    choose_probe,
    gap,
)
from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.checks.weight_copies import BaseGuard, differing_layers, signature
from rlbench.config.schema import LoraConfig
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.adapter import Adapter
from rlbench.models.policy import Policy
from rlbench.records import Completion, Prompt, SamplingParams
from rlbench.weight_sync import sync
from tests.models.test_lora import randomise

LIMIT, SMALL, LARGE = Gap(0.1, 0.5, 2.0), Gap(0.05, 0.2, 1.0), Gap(0.3, 0.4, 1.0)


SAMPLING = SamplingParams(max_tokens=5)


def sample(engine, sampling=SAMPLING):
    return engine.generate([(5, 6, 7)] * 4, sampling, [1, 2, 3, 4])


@pytest.fixture
def synced(tiny_base):
    policy, engine = Policy(tiny_base, LoraConfig(rank=4), seed=0), HfEngine(tiny_base)
    randomise(policy.model)
    return policy, engine, sync(policy.adapter(), engine, 1)


def test_rollouts_of_the_synced_adapter_pass(synced):
    _, engine, fingerprint = synced

    check_completions(sample(engine), 1, fingerprint)


def test_a_skipped_sync_is_caught(synced):
    policy, engine, _ = synced
    with torch.no_grad():
        policy.parameters()[0].add_(0.1)

    with pytest.raises(PolicyIdentityError, match="sampled by policy version 1, but the trainer is at 2"):
        check_completions(sample(engine), 2, policy.adapter().fingerprint())


def test_other_bytes_under_the_same_version_are_caught(synced):
    policy, engine, _ = synced
    with torch.no_grad():
        policy.parameters()[0][0, 0] += 1e-6

    with pytest.raises(PolicyIdentityError, match="other bytes"):
        check_completions(sample(engine), 1, policy.adapter().fingerprint())


def test_rollouts_of_the_base_are_caught(tiny_base, synced):
    _, _, fingerprint = synced
    never_synced = HfEngine(tiny_base)

    with pytest.raises(PolicyIdentityError, match="sampled with adapter base"):
        check_completions(sample(never_synced), 0, fingerprint)


@pytest.mark.parametrize(
    ("rollouts", "adapter", "base", "cause"),
    [
        (SMALL, SMALL, SMALL, ""),
        (LARGE, LARGE, LARGE, "without the adapter too: other base weights or other kernels"),
        (LARGE, LARGE, SMALL, "the engine's adapter is not the trainer's"),
        (LARGE, SMALL, SMALL, "cached keys and values of an older version"),
        (SMALL, SMALL, LARGE, "one side does not switch its adapter off"),
    ],
)
def test_the_verdict_names_the_side_that_moved(rollouts, adapter, base, cause):
    proof = Proof(rollouts=rollouts, adapter=adapter, base=base, adapter_effect=0.2, num_tokens=9)

    assert cause in proof.verdict(LIMIT)
    assert bool(proof.verdict(LIMIT)) == bool(cause)


@pytest.mark.parametrize(
    "wrong", [Gap(0.2, 0.2, 1.0), Gap(0.05, 0.6, 1.0), Gap(0.05, 0.2, 3.0), Gap(*[float("nan")] * 3)]
)
def test_mean_99th_percentile_maximum_and_nan_count_each(wrong):
    assert wrong.exceeds(LIMIT) and not SMALL.exceeds(LIMIT)


def test_a_gap_is_of_absolute_differences():
    found = gap(torch.tensor([0.0, -1.0, -2.0]), torch.tensor([-0.3, -1.0, -1.4]))

    assert (found.mean, found.max) == pytest.approx((0.3, 0.6))
    assert 0.59 < found.p99 <= 0.6


def test_the_probe_takes_first_completions_of_all_groups_before_second_ones():
    prompts = [Prompt(prompt_id=str(n), text="", token_ids=(1,) * n) for n in (5, 50, 6)]
    groups = [[completion(10), completion(11)] for _ in prompts]

    chosen = choose_probe(prompts, groups, 50)

    assert [(len(p.token_ids), len(c.token_ids)) for p, c in chosen] == [(5, 10), (6, 10), (5, 11)]
    assert [len(p.token_ids) for p, _ in choose_probe(prompts, groups, 3)] == [5]


def completion(length: int) -> Completion:
    return Completion(
        token_ids=(1,) * length,
        sampling_logprobs=(0.0,) * length,
        finish_reason="length",
        seed=0,
        policy_version=0,
        adapter_fingerprint="",
    )


def test_logprobs_are_compared_at_the_first_step_and_every_n(tiny_base, synced):
    policy, engine, fingerprint = synced
    identity = PolicyIdentity(
        engine, policy, tiny_base, limit=Gap(1e-4, 1e-3, 1e-2), every_steps=3, max_tokens=64, sampling=SAMPLING
    )
    prompts, completions = [Prompt(prompt_id="0", text="", token_ids=(5, 6, 7))], [sample(engine)]

    def is_compared(step: int) -> bool:
        return bool(identity.check(step, prompts, completions, policy_version=1, fingerprint=fingerprint))

    assert [step for step in range(2, 10) if is_compared(step)] == [2, 3, 6, 9]


def compare(engine, policy, base, sampled_with, said):
    identity = PolicyIdentity(engine, policy, base, limit=LIMIT, every_steps=1, max_tokens=64, sampling=said)
    return identity.compare([Prompt(prompt_id="0", text="", token_ids=(5, 6, 7))], [sample(engine, sampled_with)])


@pytest.mark.parametrize(
    "truncation", [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.5}, {"min_p": 0.3, "top_k": 9, "top_p": 0.8}]
)
def test_logprobs_of_truncated_sampling_are_the_trainers_on_its_support(tiny_base, synced, truncation):
    policy, engine, _ = synced
    sampling = SamplingParams(max_tokens=5, temperature=0.7, **truncation)

    proof = compare(engine, policy, tiny_base, sampling, sampling)

    assert proof.truncated is not None and proof.truncated.max < 1e-4 and proof.rollouts.max < 1e-4
    assert proof.metrics()["identity/truncated_gap_max"] == proof.truncated.max
    plain = SamplingParams(max_tokens=5, temperature=0.7)
    ignored = compare(engine, policy, tiny_base, plain, sampling)
    assert ignored.truncated is not None and ignored.truncated.mean > 0.1 > ignored.rollouts.max


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6, "presence_penalty": 0.5}])
def test_truncated_logprobs_are_not_compared_where_something_else_changed_them(tiny_base, synced, options):
    policy, engine, _ = synced
    sampling = SamplingParams(max_tokens=5, **options)

    proof = compare(engine, policy, tiny_base, sampling, sampling)

    assert proof.truncated is None and "identity/truncated_gap_max" not in proof.metrics()


def test_trainer_logprobs_equal_the_engines_scores_with_and_without_adapter_in_order(synced):
    policy, engine, _ = synced
    prompts, completions = [(5, 6, 7), (5, 6), (5, 6, 7)], [(1, 2), (3,), (4, 5, 6)]
    microbatch = pack_sequences(prompts, completions, policy.device)

    for use_adapter in (True, False):
        (found,) = trainer_logprobs(policy, microbatch, use_adapter=use_adapter)

        expected = [x for row in engine.score(prompts, completions, use_adapter=use_adapter) for x in row]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


def adapter(scale: float = 1.0, rank: int = 2, **extra) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    names = ("x", "y")
    return Adapter(
        lora_a={n: torch.randn(rank, 4, generator=generator) for n in names},
        lora_b={n: torch.randn(3, rank, generator=generator) * scale for n in names},
        scaling=1.5,
    )


def held(trained: Adapter, *, dtype=torch.bfloat16, slots: int = 4) -> Adapter:
    def padded(tensor, *shape):
        out = torch.zeros(shape, dtype=dtype)
        out[: tensor.shape[0], : tensor.shape[1]] = tensor.to(dtype)
        return out

    return Adapter(
        lora_a={n: padded(t, slots, 4) for n, t in trained.lora_a.items()},
        lora_b={n: padded(t * trained.scaling, 3, slots) for n, t in trained.lora_b.items()},
        scaling=1.0,
    )


def test_a_padded_bf16_copy_is_the_same_adapter_and_any_change_is_found():
    trained = adapter()
    assert differing_layers(held(trained), trained) == []

    for place in ("lora_a", "lora_b"):
        for index in ((1, 1), (-1, -1)):  # of the adapter, and of the padding where B has it
            copy = held(trained)
            getattr(copy, place)["y"][index] += 0.5
            is_idle = place == "lora_a" and index == (-1, -1)  # a row of A beyond the rank meets zeros of B
            assert differing_layers(copy, trained) == ([] if is_idle else ["y"])


def test_a_layer_that_only_one_side_has_differs_unless_it_is_zero():
    trained, copy = adapter(), held(adapter())
    del copy.lora_a["y"], copy.lora_b["y"]
    assert differing_layers(copy, trained) == ["y"]

    copy = held(trained)
    copy.lora_a["z"], copy.lora_b["z"] = torch.ones(4, 4), torch.zeros(3, 4)
    assert differing_layers(copy, trained) == []
    copy.lora_b["z"][0, 0] = 1e-6
    assert differing_layers(copy, trained) == ["z"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(8, 8), (3,), (5, 7)])
def test_a_signature_shows_any_changed_byte(dtype, shape):
    tensor = torch.arange(64).to(dtype)[: torch.Size(shape).numel()].view(shape).clone()
    before = signature({"x": tensor})

    for i in range(tensor.numel()):
        saved = tensor.flatten()[i].clone()
        tensor.view(-1)[i] += 1
        assert signature({"x": tensor}) != before
        tensor.view(-1)[i] = saved
    assert signature({"x": tensor}) == before == signature({"x": torch.cat([tensor, tensor])[: len(tensor)]})


def test_the_guard_reads_shared_weights_once_and_names_the_side():
    engine = {"w": torch.ones(4, 4), "own": torch.ones(3), "empty": torch.empty(0)}
    trainer = {"model.w": engine["w"], "own": torch.ones(3)}
    guard = BaseGuard(engine, trainer)
    assert guard.changed() == []

    engine["w"][0, 0] = 2
    trainer["own"][1] = 2

    assert guard.changed() == ["shared w", "trainer own"]


def test_rows_of_a_fused_weight_are_shared_with_it():
    fused = torch.ones(6, 4)
    guard = BaseGuard({"qkv": fused}, {"q": fused[:2], "k": fused[2:4], "v": fused[4:]})

    fused[5, 1] = 0

    assert guard.changed() == ["shared qkv"]
