"""What every engine must do with the trainer's adapter; see `contract.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlbench.engine.interface import BASE_FINGERPRINT, Adapter
from rlbench.records import SamplingParams
from tests.engine.contract import (
    NATS,
    PROMPTS,
    SAMPLINGS,
    Subject,
    assert_logprobs_match,
    completions_carry_seed_version_and_fingerprint,
    sample,
)


def sync_computes_what_peft_computes(subject: Subject):
    adapter = subject.make_adapter(1)
    completions = [[5, 6, 7, 8]] * len(PROMPTS)
    base = [subject.scores(p, c, use_adapter=False) for p, c in zip(PROMPTS, completions, strict=True)]

    version = subject.sync(adapter)

    scores = subject.engine.score(PROMPTS, completions)
    for prompt, completion, found, without in zip(PROMPTS, completions, scores, base, strict=True):
        assert found == pytest.approx(subject.scores(prompt, completion), abs=NATS)
        assert max(abs(a - b) for a, b in zip(found, without, strict=True)) > 0.05, (
            "the adapter hardly changes anything"
        )
    assert subject.engine.policy_version == version
    assert subject.engine.adapter_fingerprint == adapter.fingerprint() != BASE_FINGERPRINT
    completions_carry_seed_version_and_fingerprint(subject)
    for prompt, completion in zip(PROMPTS, sample(subject, PROMPTS, SAMPLINGS[1]), strict=True):
        assert_logprobs_match(subject, prompt, completion, SAMPLINGS[1])


def score_without_the_adapter_equals_the_base(subject: Subject):
    subject.sync(subject.make_adapter(2))
    completions = [[5, 6, 7, 8]] * len(PROMPTS)

    without = subject.engine.score(PROMPTS, completions, use_adapter=False)
    with_adapter = subject.engine.score(PROMPTS, completions)

    for prompt, completion, base, adapted in zip(PROMPTS, completions, without, with_adapter, strict=True):
        assert base == pytest.approx(subject.scores(prompt, completion, use_adapter=False), abs=NATS)
        assert adapted == pytest.approx(subject.scores(prompt, completion), abs=NATS)


def later_changes_of_the_trainers_tensors_do_not_reach_the_engine(subject: Subject):
    adapter = subject.make_adapter(3)
    subject.sync(adapter)
    before = subject.engine.score(PROMPTS, [[5, 6]] * len(PROMPTS))

    for tensor in (*adapter.lora_a.values(), *adapter.lora_b.values()):
        tensor.mul_(3.0)

    assert subject.engine.score(PROMPTS, [[5, 6]] * len(PROMPTS)) == before


def a_second_sync_uses_no_cached_prefix_of_the_first(subject: Subject):
    prompt, sampling = PROMPTS[5], SamplingParams(max_tokens=8, temperature=0.7)
    for seed in (4, 5, 6):
        subject.sync(subject.make_adapter(seed))
        for completion in sample(subject, [prompt] * 3, sampling):
            assert_logprobs_match(subject, prompt, completion, sampling)


def a_layer_that_the_adapter_does_not_name_has_none(subject: Subject):
    subject.sync(subject.make_adapter(7))
    whole = subject.make_adapter(8)
    names = sorted(whole.lora_a)[:2]

    subject.sync(
        Adapter(
            lora_a={n: whole.lora_a[n] for n in names},
            lora_b={n: whole.lora_b[n] for n in names},
            scaling=whole.scaling * 2,
        )
    )

    (found,) = subject.engine.score([PROMPTS[2]], [[5, 6, 7]])
    assert found == pytest.approx(subject.scores(PROMPTS[2], [5, 6, 7]), abs=NATS)


def a_lower_version_is_refused_and_an_equal_one_taken(subject: Subject):
    version = subject.sync(subject.make_adapter(9))

    with pytest.raises(ValueError, match=str(version)):
        subject.engine.sync(subject.make_adapter(10), version - 1)
    subject.adapter = subject.make_adapter(11)
    subject.engine.sync(subject.adapter, version)

    (found,) = subject.engine.score([PROMPTS[2]], [[5, 6, 7]])
    assert found == pytest.approx(subject.scores(PROMPTS[2], [5, 6, 7]), abs=NATS)


def an_adapter_that_does_not_fit_is_refused_and_changes_nothing(subject: Subject):
    version = subject.sync(subject.make_adapter(12))
    fingerprint = subject.engine.adapter_fingerprint
    good = subject.make_adapter(13)
    name = sorted(good.lora_a)[-1]
    a, b = good.lora_a[name], good.lora_b[name]

    def broken(lora_a: dict[str, Tensor], lora_b: dict[str, Tensor]) -> Adapter:
        return Adapter(lora_a={**good.lora_a, **lora_a}, lora_b={**good.lora_b, **lora_b}, scaling=1.0)

    for message, adapter in (
        (
            "model.layers.77.mlp.down_proj",
            broken({"model.layers.77.mlp.down_proj": a}, {"model.layers.77.mlp.down_proj": b}),
        ),  # fmt: skip
        (name, broken({name: a[:, :-1]}, {})),
        (name, broken({}, {name: b[:-1]})),
        (name, broken({name: a[:-1]}, {})),
        ("alone", broken({"model.layers.0.mlp.other_proj": a}, {})),
    ):
        with pytest.raises(ValueError, match=message):
            subject.engine.sync(adapter, version + 1)

    assert (subject.engine.policy_version, subject.engine.adapter_fingerprint) == (version, fingerprint)
    (found,) = subject.engine.score([PROMPTS[2]], [[5, 6, 7]])
    assert found == pytest.approx(subject.scores(PROMPTS[2], [5, 6, 7]), abs=NATS)


def the_held_adapter_is_the_synced_one(subject: Subject):
    adapter = subject.make_adapter(16)
    subject.sync(adapter)

    held = subject.engine.held_adapter()

    assert held.scaling == 1.0 and set(held.lora_a) == set(held.lora_b) == set(adapter.lora_a)
    for name, lora_a in adapter.lora_a.items():
        rank = len(lora_a)
        assert torch.equal(held.lora_a[name][:rank], lora_a)
        assert torch.equal(held.lora_b[name][:, :rank], adapter.lora_b[name] * adapter.scaling)
        assert not held.lora_a[name][rank:].any() and not held.lora_b[name][:, rank:].any()


ADAPTER_CHECKS: list[Callable[[Subject], None]] = [
    sync_computes_what_peft_computes,
    score_without_the_adapter_equals_the_base,
    later_changes_of_the_trainers_tensors_do_not_reach_the_engine,
    a_second_sync_uses_no_cached_prefix_of_the_first,
    a_layer_that_the_adapter_does_not_name_has_none,
    a_lower_version_is_refused_and_an_equal_one_taken,
    an_adapter_that_does_not_fit_is_refused_and_changes_nothing,
    the_held_adapter_is_the_synced_one,
]
