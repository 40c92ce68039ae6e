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
    loop: Callable[..., Any]  # a TrainingLoop
    learned: Mapping[str, str]  # metrics that the summary compares, by the name it gives them; empty: the rewards


def load_stage(name: str) -> Stage:
    """The stage that `stage=` names. Heavy libraries are imported here."""
    return {"rl": _rl, "sft": _sft, "preference": _preference}[name]()


def _rl() -> Stage:
    from rlbench.build import build, prepare
    from rlbench.commands.plan import plan_rows
    from rlbench.loops.rl import RlLoop

    return Stage(prepare=prepare, plan_rows=plan_rows, build=build, loop=RlLoop, learned={})


def _sft() -> Stage:
    from rlbench.build_offline import build_offline, prepare_sft
    from rlbench.commands.plan_offline import sft_plan_rows
    from rlbench.loops.sft import SftLoop

    return Stage(
        prepare=prepare_sft,
        plan_rows=sft_plan_rows,
        build=build_offline,
        loop=SftLoop,
        learned={"loss, nats a token": "loss/nll"},
    )


def _preference() -> Stage:
    from rlbench.build_offline import build_offline, prepare_preference
    from rlbench.commands.plan_offline import preference_plan_rows
    from rlbench.loops.preference import PreferenceLoop

    return Stage(
        prepare=prepare_preference,
        plan_rows=preference_plan_rows,
        build=build_offline,
        loop=PreferenceLoop,
        learned={"loss": "loss/preference", "margin": "preference/margin", "accuracy": "preference/accuracy"},
    )
