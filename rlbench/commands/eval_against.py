"""What an evaluated policy is compared with: the base, another step of its run, or another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlbench.commands.eval_held_out import seen_by
from rlbench.commands.eval_settings import settings_like
from rlbench.commands.eval_weights import Side, find_side, split_place
from rlbench.commands.run_step import BASE, policy_config
from rlbench.config.schema import RunConfig
from rlbench.tracking.console import RunConsole

if TYPE_CHECKING:
    from rlbench.build import Inputs

_COMPARED = ("model.path", "model.dtype", "model.quantization", "training.parameters", "engine.kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """The other policy of a comparison."""

    option: str  # of the command line, for messages
    side: Side
    trained: RunConfig | None  # what another run was trained with; None: the policy's own run, or the base


def find_against(option: str | None, side: Side, console: RunConsole) -> Against | None:
    """
    Args:
        option: "base", RUN or RUN@STEP; None: nothing is compared.
        side: the policy.

    Raises:
        ValueError: there is no such run or checkpoint, or it is the policy itself.
    """
    if option is None:
        return None
    if option == BASE:
        base = Side(name="the base", run_folder=side.run_folder, is_base=True)
        return Against(option=option, side=base, trained=None)
    place, which = split_place(option)
    if not place.is_dir():
        raise ValueError(f"--against is {option}, but {place} is no folder; expected base or RUN2[@STEP]")
    trained = policy_config(place)
    other, damaged = find_side(place, trained, which, "the step of --against")
    for line in damaged:
        console.warning(line)
    is_same_run = side.run_folder is not None and side.run_folder.resolve() == place.resolve()
    if is_same_run and other.step == side.step:
        raise ValueError(f"--against is {option}, which is the policy itself; expected another step or run")
    return Against(option=option, side=other, trained=None if is_same_run else trained)


def other_inputs(against: Against, inputs: Inputs, overrides: Sequence[str]) -> Inputs | None:
    """What the other policy is built from; None: from `inputs`, in one process with the policy.

    Args:
        inputs: of the policy.
        overrides: of this call.

    Raises:
        ValueError: the other run cannot answer the same prompts.
    """
    if against.trained is None or against.side.run_folder is None:
        lora = inputs.config.lora
        if lora.init_from is None:
            return None
        return replace(inputs, config=replace(inputs.config, lora=replace(lora, init_from=None)))
    from rlbench.commands.eval_measure import prepare_evaluation

    found = prepare_evaluation(settings_like(inputs.config, against.side.run_folder, against.trained, overrides))
    ours, theirs = ({p.prompt_id: p.columns for p in i.train.prompts} for i in (inputs, found))
    if ours != theirs:
        num_differing = sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())
        raise ValueError(
            f"--against is {against.option}, whose prompts are others: {num_differing} of {len(ours)} differ, e.g. as "
            "one is too long for a model; expected data that both can read"
        )
    return found


def note_differences(against: Against, inputs: Inputs, others: Inputs, console: RunConsole) -> None:
    """Say what two runs do not share, and whether the other one trained on these prompts."""
    assert against.trained is not None and against.side.run_folder is not None
    for line in seen_by(against.trained, against.side.run_folder, inputs.config):
        console.warning(line)
    for key in _COMPARED:
        section, name = key.split(".")
        ours, theirs = (getattr(getattr(i.config, section), name) for i in (inputs, others))
        if ours != theirs:
            console.note(f"{key} is {ours}, of {against.side.name} it is {theirs}")
    pairs = list(zip(inputs.train.prompts, others.train.prompts, strict=True))
    num_other_text = sum(a.text != b.text for a, b in pairs)
    if num_other_text:
        console.note(f"{num_other_text} of {len(pairs)} prompts are written otherwise, by each model's chat template")
