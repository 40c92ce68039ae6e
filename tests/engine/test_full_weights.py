"""All weights synced in place: both engines then compute the other model, from the first token on."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlbench.engine.hf_engine import HfEngine
from rlbench.engine.interface import BASE_FINGERPRINT, Adapter, Weights
from rlbench.records import SamplingParams
from tests.engine.factories import CONTEXT, start_vllm

NATS = 1e-4  # float32 on both sides; measured 1e-5
PROMPTS = [[7], [(5 * i) % 90 + 2 for i in range(70)]]
COMPLETIONS = [[5, 6, 7, 8], [9, 10, 11]]
MODELS = {
    "llama": {"tie_word_embeddings": False, "attention_bias": False},
    "qwen2": {"tie_word_embeddings": True},  # with biases of q, k and v
}


def make_model(family: str, seed: int):
    config = AutoConfig.for_model(
        family, vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT, initializer_range=0.2, eos_token_id=1,
        pad_token_id=0, bos_token_id=None, **MODELS[family],
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def weights_of(model) -> Weights:
    return Weights(tensors={name: parameter.detach() for name, parameter in model.named_parameters()})


def plain_scores(model) -> list[list[float]]:
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append([float(logprobs[row, token]) for row, token in zip(rows, completion, strict=True)])
    return found


@pytest.fixture(scope="module", params=[f"{kind}-{family}" for kind in ("hf", "vllm") for family in MODELS])
def run(request, tmp_path_factory) -> Iterator[Any]:
    kind, family = request.param.split("-")
    model = make_model(family, 0)
    if kind == "hf":
        engine: Any = HfEngine(copy.deepcopy(model))
    else:
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        engine = start_vllm(SimpleNamespace(folder=folder), lora_rank=None)  # type: ignore[arg-type]
    yield SimpleNamespace(engine=engine, family=family, kind=kind, model=model)
    engine.close()


def test_it_starts_as_the_model_of_the_folder(run):
    assert run.engine.adapter_fingerprint == BASE_FINGERPRINT
    for found, expected in zip(run.engine.score(PROMPTS, COMPLETIONS), plain_scores(run.model), strict=True):
        assert found == pytest.approx(expected, abs=NATS)


def test_after_each_sync_it_computes_the_synced_model(run):
    for seed in (1, 2):
        other = make_model(run.family, seed)
        run.engine.generate([PROMPTS[1]], SamplingParams(max_tokens=2), [1])  # leaves a prefix of the old weights
        version = run.engine.policy_version + 1

        run.engine.sync(weights_of(other), version)

        expected = plain_scores(other)
        assert max(abs(a - b) for a, b in zip(expected[0], plain_scores(run.model)[0], strict=True)) > 0.5
        for found, wanted in zip(run.engine.score(PROMPTS, COMPLETIONS), expected, strict=True):
            assert found == pytest.approx(wanted, abs=NATS)
        completions = run.engine.generate([PROMPTS[1]] * 2, SamplingParams(max_tokens=4), [1, 2])
        for completion in completions:
            tokens = list(completion.token_ids)
            with torch.inference_mode():
                logprobs = other(input_ids=torch.tensor([PROMPTS[1] + tokens])).logits[0].log_softmax(-1)
            rows = range(len(PROMPTS[1]) - 1, len(PROMPTS[1]) + len(tokens) - 1)
            wanted = [float(logprobs[row, token]) for row, token in zip(rows, tokens, strict=True)]
            assert list(completion.sampling_logprobs) == pytest.approx(wanted, abs=NATS)
            assert (completion.policy_version, completion.adapter_fingerprint) == (
                version,
                weights_of(other).fingerprint(),
            )


def test_held_weights_are_the_synced_ones_in_the_same_place(run):
    before = {name: tensor.data_ptr() for name, tensor in run.engine.held_weights().items()}
    other = make_model(run.family, 3)

    run.engine.sync(weights_of(other), run.engine.policy_version + 1)

    held = run.engine.held_weights()
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == before
    for name, tensor in held.items():
        assert torch.equal(tensor, weights_of(other).tensors[name]), name
    if run.kind == "hf":
        assert Weights(tensors=held).fingerprint() == weights_of(other).fingerprint()
    else:  # a CPU keeps what no kernel wants packed
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= held.keys()


def test_sleeping_changes_nothing(run):
    other = make_model(run.family, 4)
    run.engine.sleep()
    run.engine.sync(weights_of(other), run.engine.policy_version + 1)
    run.engine.wake()

    for found, wanted in zip(run.engine.score(PROMPTS, COMPLETIONS), plain_scores(other), strict=True):
        assert found == pytest.approx(wanted, abs=NATS)


def test_weights_that_do_not_fit_are_refused_and_change_nothing(run):
    good = dict(weights_of(make_model(run.family, 5)).tensors)
    version, fingerprint = run.engine.policy_version, run.engine.adapter_fingerprint
    before = run.engine.score(PROMPTS, COMPLETIONS)
    name = "model.layers.1.self_attn.k_proj.weight"
    for message, tensors in {
        f"{name} has shape": {**good, name: good[name][:-1]},
        "model.other.weight and 0 more are unknown": {**good, "model.other.weight": good[name]},
        f"{name} and 0 more are missing": {key: value for key, value in good.items() if key != name},
    }.items():
        with pytest.raises(ValueError, match=message):
            run.engine.sync(Weights(tensors=tensors), version + 1)
    with pytest.raises(ValueError, match=f"sync to policy_version {version - 1}"):
        run.engine.sync(Weights(tensors=good), version - 1)

    assert (run.engine.policy_version, run.engine.adapter_fingerprint) == (version, fingerprint)
    assert run.engine.score(PROMPTS, COMPLETIONS) == before


@pytest.mark.parametrize("run", ["vllm-llama"], indirect=True)
def test_it_takes_what_it_was_started_for(run):
    with pytest.raises(ValueError, match="sync of Adapter, but this engine was started for all weights"):
        run.engine.sync(Adapter(lora_a={}, lora_b={}, scaling=1.0), 99)


def test_shared_tensors_are_not_copied():
    model = make_model("llama", 0)
    engine = HfEngine(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)

    engine.sync(weights_of(model), 1)

    assert engine.held_weights()["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    for found, wanted in zip(engine.score(PROMPTS, COMPLETIONS), plain_scores(model), strict=True):
        assert found == pytest.approx(wanted, abs=NATS)


def test_a_fingerprint_sees_one_bit_and_two_numbers_that_swap_places():
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    known = Weights(tensors=tensors).fingerprint()
    swapped = tensors["a"].clone()
    swapped[0, 0], swapped[2, 2] = tensors["a"][2, 2].item(), tensors["a"][0, 0].item()
    flipped = tensors["b"].clone()
    flipped.view(torch.int16)[3] ^= 1

    assert Weights(tensors={"b": tensors["b"].clone(), "a": tensors["a"].clone()}).fingerprint() == known
    for changed in ({"a": swapped}, {"b": flipped}, {"b": tensors["b"].float()}, {"a": tensors["a"].view(4, 3)}):
        assert Weights(tensors={**tensors, **changed}).fingerprint() != known
