"""Rollouts for the tracking tests."""

from collections.abc import Callable

import pytest

from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup

HOSTILE = "[red]\x1b[2Jclear[/red] \ud800 \x00 \u202e :smile: \r\n\ttab 日本語"


def make_rollout(
    index: int = 0,
    *,
    prompt_id: str = "train/7",
    text: str = "four",
    components: dict[str, RewardComponent] | None = None,
    reward: float | None = 1.0,
    num_tokens: int = 2,
    finish_reason: str = "stop",
    columns: dict | None = None,
) -> Rollout:
    if components is None:
        components = {"accuracy": RewardComponent(status="value", value=reward, weight=1.0)}
    return Rollout(
        rollout_id=f"12/{prompt_id}/{index}",
        prompt=Prompt(prompt_id=prompt_id, text=f"What is 2 + 2? {text}", token_ids=(5, 6), columns=columns or {}),
        completion=Completion(
            token_ids=tuple(range(num_tokens)),
            sampling_logprobs=(-0.5,) * num_tokens,
            finish_reason=finish_reason,
            seed=2**63 - 1,
            policy_version=3,
            adapter_fingerprint="9f2c",
        ),
        completion_text=text,
        sample_index=index,
        components=components,
        reward=reward,
    )


def make_group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(prompt=rollouts[0].prompt, rollouts=rollouts)


@pytest.fixture
def rollout() -> Callable[..., Rollout]:
    return make_rollout


@pytest.fixture
def group() -> Callable[..., RolloutGroup]:
    return make_group


@pytest.fixture
def hostile() -> str:
    return HOSTILE
