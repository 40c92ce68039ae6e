"""Each way in which an engine can sample from other weights than the trainer's, injected, is named within one step.

Against the HF engine, which shares the trainer's base, and against real vLLM, which on a CPU holds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlbench.checks.limits import FLOORS
from rlbench.checks.policy_identity import PolicyIdentity, PolicyIdentityError
from rlbench.config.schema import LoraConfig
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.adapter import Adapter
from rlbench.models.base import load_base
from rlbench.models.policy import Policy
from rlbench.records import Completion, Prompt, SamplingParams
from rlbench.weight_sync import sync
from tests.engine.factories import RANK, TinyModel, start_vllm

LAYER = "model.layers.1.mlp.up_proj"
LAYERS = 14  # of the tiny model
# Longer than two blocks of vLLM's paged cache, so that a prefix can be cached.
PROMPTS = [
    Prompt(prompt_id=str(j), text="", token_ids=tuple((5 * i + j) % 90 + 2 for i in range(70 + j))) for j in range(3)
]


SAMPLING = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9)


# The hf engine computes with the trainer's own base, keeps every weight in reach and no prefix beyond one call.
only_vllm = pytest.mark.parametrize("run", ["vllm"], indirect=True)


@dataclass
class Run:
    """What a training loop holds, with an update that changes the adapter by little: far less than bf16 would show."""

    engine: Any
    policy: Policy
    base: torch.nn.Module
    write: Callable[[Adapter], None]  # puts an adapter into the engine behind its back
    version: int = 0
    fingerprint: str = ""
    step: int = 0
    identity: PolicyIdentity = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.engine.policy_version
        self.identity = PolicyIdentity(
            self.engine,
            self.policy,
            self.base,
            limit=FLOORS["float32"],
            every_steps=1,
            max_tokens=512,
            sampling=SAMPLING,
        )
        self.sync()

    def update(self, size: float = 1e-4) -> None:
        """One optimizer step; the first version's B is not zero."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        self.version += 1

    def sync(self) -> None:
        self.fingerprint = sync(self.policy.adapter(), self.engine, self.version)
        self.identity.record_sync(self.version)

    def sample(self) -> list[list[Completion]]:
        prompts = [prompt.token_ids for prompt in PROMPTS for _ in range(2)]
        flat = self.engine.generate(prompts, SAMPLING, range(6))
        return [flat[i : i + 2] for i in range(0, 6, 2)]

    def check(self, completions: list[list[Completion]] | None = None) -> dict[str, float]:
        """What the loop does between sampling and training."""
        self.step += 1
        return self.identity.check(
            self.step,
            PROMPTS,
            completions or self.sample(),
            policy_version=self.version,
            fingerprint=self.fingerprint,
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def vllm_engine(tiny) -> Iterator[Any]:
    engine = start_vllm(tiny)
    yield engine
    engine.close()


@pytest.fixture(params=["hf", "vllm"])
def run(request, tiny) -> Run:
    base = load_base(str(tiny.folder), dtype=torch.float32, device="cpu")
    if request.param == "hf":
        engine: Any = HfEngine(base)
        write = engine._decoder.slots.load
    else:
        engine = request.getfixturevalue("vllm_engine")

        def write(adapter: Adapter) -> None:
            engine._call("rlbench_write_adapter", 1, adapter.lora_a, adapter.lora_b, adapter.scaling)

    policy = Policy(base, LoraConfig(rank=RANK, alpha=2.0 * RANK), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Run(engine, policy, base, write)


def copy_of(adapter: Adapter) -> Adapter:
    return Adapter(
        lora_a={n: t.clone() for n, t in adapter.lora_a.items()},
        lora_b={n: t.clone() for n, t in adapter.lora_b.items()},
        scaling=adapter.scaling,
    )


def test_honest_steps_pass_and_report_their_gaps(run):
    for _ in range(3):
        metrics = run.check()
        run.update()
        run.sync()

    assert 0 < metrics["identity/rollout_gap_mean"] < 2e-5
    assert metrics["identity/adapter_gap_max"] < 2e-4 and metrics["identity/base_gap_max"] < 2e-4
    assert 0 < metrics["identity/truncated_gap_max"] < 2e-4
    assert metrics["identity/adapter_effect_mean"] > 0.1
    assert metrics["identity/num_tokens"] == 48


def test_a_sync_that_was_skipped_once(run):
    run.check()
    run.update()

    # The loop goes on as if it had synced.
    run.fingerprint = run.policy.adapter().fingerprint()

    with pytest.raises(PolicyIdentityError, match="the last weight sync did not reach the engine"):
        run.check()


def test_the_adapter_of_the_previous_version_under_the_new_name(run):
    run.check()
    previous, version = copy_of(run.policy.adapter()), run.version
    run.update()
    run.sync()

    run.write(previous)

    with pytest.raises(PolicyIdentityError, match=f"the engine holds the adapter of policy version {version};"):
        run.check()


def test_one_layer_without_its_lora(run):
    run.check()

    run.engine.held_adapter().lora_b[LAYER].zero_()

    with pytest.raises(PolicyIdentityError, match=rf"no adapter \(zeros\) in 1 of {LAYERS} layers, .* is {LAYER}"):
        run.check()


def test_a_scaling_that_is_not_folded_in(run):
    run.check()

    run.write(replace(run.policy.adapter(), scaling=1.0))

    with pytest.raises(PolicyIdentityError, match=rf"scaling of 2 \(lora.alpha\) was not folded .* in {LAYERS} of"):
        run.check()


def test_one_number_of_the_adapter_off_by_its_last_bit(run):
    run.check()
    held = run.engine.held_adapter().lora_a[LAYER]
    before = held[1, 1].clone()

    held[1, 1] = torch.nextafter(before, torch.tensor(9.0))

    with pytest.raises(PolicyIdentityError, match=f"holds other values in 1 of {LAYERS} layers, the first is {LAYER}"):
        run.check()


def test_a_trainer_whose_adapter_moved_after_the_sync(run):
    run.check()
    completions = run.sample()

    with torch.no_grad():
        run.policy.parameters()[5].mul_(1.001)

    with pytest.raises(PolicyIdentityError, match="the engine holds other values in 1 of"):
        run.check(completions)


def test_an_overwritten_base_weight(run):
    run.check()
    tensors = run.engine.base_tensors()
    weight = tensors["model.embed_tokens.weight"]
    saved = weight[300, 3].clone()  # of a token that no prompt holds: no logprob shows it

    weight[300, 3] += 1e-3

    side = "the shared base" if run.engine.name == "hf" else "the engine's base"
    with pytest.raises(PolicyIdentityError, match=f"{side} changed .* in 1 weights, the first is model.embed_tokens"):
        run.check()
    weight[300, 3] = saved
    run.check()


@only_vllm
def test_an_overwritten_base_weight_of_the_trainer(run):
    run.check()

    with torch.no_grad():
        run.base.get_parameter("model.norm.weight")[0] += 1e-3

    with pytest.raises(PolicyIdentityError, match="the trainer's base changed .* the first is model.norm.weight"):
        run.check()


@only_vllm
def test_other_base_weights_that_only_logprobs_show(run, monkeypatch):
    """vLLM on a CPU repacks its linear weights out of reach; a wrong one shows with and without the adapter."""
    run.check()
    module = run.engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    linear = module.get_model().get_submodule("model.layers.0.mlp.down_proj.base_layer")
    weight = run.base.get_parameter("model.layers.0.mlp.down_proj.weight") * 1.05

    monkeypatch.setattr(linear, "cpu_linear", lambda x, _, bias: F.linear(x, weight, bias))

    with pytest.raises(PolicyIdentityError, match=r"^policy version \d+: .*without the adapter too: other base"):
        run.check()


@only_vllm
def test_prefixes_that_are_kept_across_versions(run, monkeypatch):
    monkeypatch.setattr(run.engine, "_drop_prefixes", lambda: None)
    monkeypatch.setattr(run.engine, "_cache_salt", lambda has_adapter: "the same for all")
    run.check()
    run.update(size=0.02)
    run.sync()

    with pytest.raises(PolicyIdentityError, match="cached keys and values of an older version"):
        run.check()
    monkeypatch.undo()
    run.sync()
    run.check()


@pytest.mark.parametrize("fault", ["previous version", "zeros in a layer", "no scaling"])
def test_logprobs_alone_show_a_wrong_adapter_too(run, fault):
    previous = copy_of(run.policy.adapter())
    run.update(size=0.02)
    run.sync()
    if fault == "previous version":
        run.write(previous)
    elif fault == "zeros in a layer":
        run.engine.held_adapter().lora_b[LAYER].zero_()
    else:
        run.write(replace(run.policy.adapter(), scaling=1.0))

    verdict = run.identity.compare(PROMPTS, run.sample()).verdict(FLOORS["float32"])

    assert "agree without the adapter and not with it: the engine's adapter is not the trainer's" in verdict
