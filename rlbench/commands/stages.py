"""What a stage is made of: how its inputs are prepared, planned and built, and its loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    prepare: Callable[[Any], Any]
    plan_rows: Callable[[Any, Any], list[Any]]
    build: Callable[[Any], Any]
    load_loop: Callable[[], Callable[..., Any]]  # imports torch, returns the class of a TrainingLoop
    learned: Mapping[str, str]  # metrics that the summary compares, by the name it gives them; empty: the rewards


def load_stage(name: str) -> Stage:
    """The stage that `stage=` names. Nothing heavy is imported: a wrong path must not wait for torch."""
    return {"rl": _rl, "sft": _sft, "preference": _preference, "reward_model": _reward_model}[name]()


def _rl() -> Stage:
    from rlbench.build import build, prepare
    from rlbench.commands.plan import plan_rows

    return Stage(prepare=prepare, plan_rows=plan_rows, build=build, load_loop=_rl_loop, learned={})


def _sft() -> Stage:
    from rlbench.build_offline import build_offline, prepare_sft
    from rlbench.commands.plan_offline import sft_plan_rows

    return Stage(
        prepare=prepare_sft,
        plan_rows=sft_plan_rows,
        build=build_offline,
        load_loop=_sft_loop,
        learned={"loss, nats a token": "loss/nll"},
    )


def _preference() -> Stage:
    from rlbench.build_offline import build_offline, prepare_preference
    from rlbench.commands.plan_offline import preference_plan_rows

    return Stage(
        prepare=prepare_preference,
        plan_rows=preference_plan_rows,
        build=build_offline,
        load_loop=_preference_loop,
        learned={"loss": "loss/preference", "margin": "preference/margin", "accuracy": "preference/accuracy"},
    )


def _reward_model() -> Stage:
    from rlbench.build_offline import build_reward_model, prepare_reward_model
    from rlbench.commands.plan_offline import reward_model_plan_rows

    return Stage(
        prepare=prepare_reward_model,
        plan_rows=reward_model_plan_rows,
        build=build_reward_model,
        load_loop=_reward_model_loop,
        learned={"loss": "loss/reward_model", "margin": "reward_model/margin", "accuracy": "reward_model/accuracy"},
    )


def _rl_loop() -> Callable[..., Any]:
    from rlbench.loops.rl import RlLoop

    return RlLoop


def _sft_loop() -> Callable[..., Any]:
    from rlbench.loops.sft import SftLoop

    return SftLoop


def _preference_loop() -> Callable[..., Any]:
    from rlbench.loops.preference import PreferenceLoop

    return PreferenceLoop


def _reward_model_loop() -> Callable[..., Any]:
    from rlbench.loops.reward_model import RewardModelLoop

    return RewardModelLoop
