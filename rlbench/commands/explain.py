"""`python -m rlbench explain +exp=... [overrides] [KEY ...]`: every value of a run and where it comes from.

No run starts: no weights are loaded, nothing is written. The rows are read where the KV cache depends on them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain as joined
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.commands.command_line import CommandLine
from rlbench.config.chain import stage_configs, stage_name, unread_sections
from rlbench.config.compose import explain_dashed_setting, resolve_model_shorthand, to_run_config, unknown_key
from rlbench.config.derive import Derivation, derive
from rlbench.config.full_training import high_lr_note
from rlbench.config.key_docs import key_doc, schema_file
from rlbench.config.resume import keep_derived
from rlbench.config.schema import AUTO, STAGES, RunConfig
from rlbench.config.sources import UNDECLARED, Layer, Setting, compose_with_layers, settings, stage_layers
from rlbench.tracking.console import PlanRow, RunConsole
from rlbench.tracking.safe_text import shorten

if TYPE_CHECKING:
    from rlbench.config.derive import HardwareFacts

USAGE = "python -m rlbench explain [+exp=NAME] [overrides] [KEY ...] [--changed]"
_VALUE_CHARS = 60
_KEPT = "kept from the run that is resumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedRun:
    """One run, or one stage of a chain."""

    title: str  # "" for a run that is no stage
    stage: str
    settings: list[Setting]
    problems: list[str]  # what could not be derived here, in sentences
    lr_note: str = ""  # of an optim.lr that is set and unusual


def explain(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 if a run with these settings could not start here (all is printed, the reason last).

    Raises:
        ValueError: a mistake of the user.
        HydraException, OmegaConfBaseException: the settings do not compose.
    """
    keys, overrides, only_changed = _split(arguments)
    overrides, notes = resolve_model_shorthand(overrides)
    layers, runs = explained_runs(overrides)
    shown = [_selected(run, keys) for run in runs]
    for key in keys:
        if not any(_is_in(setting.key, key) for run in shown for setting in run.settings):
            raise ValueError(unknown_key(key))
    console = RunConsole()
    for note in notes:
        console.note(note)
    resume = next((override for override in overrides if override.lstrip("+").startswith("resume=")), None)
    if (
        resume
        and resume.partition("=")[2] not in ("", "null")
        and not any(s.reason.startswith(_KEPT) for run in runs for s in run.settings)
    ):
        console.warning(f"{resume}: what that run derived when it began is not known here; a new run would derive this")
    if not keys:
        console.note(f"composed of {', '.join(_layer_text(layer) for layer in layers if layer.keys)}")
        console.note("* differs from the schema's default\n")
    for run in shown:
        if run.title:
            console.note(f"\n{run.title}, stage={run.stage}")
        console.plan(list(_rows(run, keys, only_changed)))
        if run.lr_note and any(setting.key == "optim.lr" for setting in run.settings):
            console.warning(f"optim.lr is {run.lr_note}")
    problems = dict.fromkeys(problem for run in runs for problem in run.problems)
    for problem in problems:
        print(f"error: {problem}; so nothing was derived", file=sys.stderr)
    return 2 if problems else 0


def command_line() -> CommandLine:
    line = CommandLine("explain", USAGE, settings="KEY is a setting, e.g. optim.lr, or a section, e.g. optim.")
    line.add_argument("--changed", action="store_true", help="leave out what is as by default")
    return line


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Keys to show, overrides, and whether only changed values are shown.

    Raises:
        ValueError: an option that there is not.
    """
    line = command_line()
    options, words = line.split(arguments)
    wrong = next((word for word in words if word.startswith("-")), None)
    if wrong is not None:
        dashed = explain_dashed_setting([wrong])
        raise ValueError(dashed) if dashed else line.mistake(f"explain has no option {wrong}")
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    return [word for word in words if word not in overrides], overrides, options.changed


def explained_runs(overrides: Sequence[str]) -> tuple[list[Layer], list[ExplainedRun]]:
    """What a run with these overrides would be: its layers, and its settings with their origins, stage by stage.

    Raises:
        ValueError: a value is out of range, or no valid choice.
        HydraException, OmegaConfBaseException: the settings do not compose.
    """
    composed, layers = compose_with_layers(overrides)
    config = to_run_config(composed)
    from rlbench.models.device import hardware_facts

    facts = hardware_facts(config.hardware.profile, config.hardware.memory_gib)
    if not config.chain:
        return layers, [_explained(config, layers, facts)]
    kinds = stage_configs(config, overrides)
    runs = []
    for index, (stage, its_config) in enumerate(zip(config.chain, kinds, strict=True)):
        given: list[Derivation] = []
        if index > 0:
            before = f"{index}_{config.chain[index - 1].name}"
            its_config.lora.init_from = before
            reason = "the chain sets it: the folder of the stage before, in the chain's own"
            given.append(Derivation(key="lora.init_from", value=before, reason=reason))
        own = stage_layers(stage, index, unread_sections(its_config.stage, [c.stage for c in kinds]))
        runs.append(_explained(its_config, [*layers, *own], facts, given, title=stage_name(config.chain, index)))
    return layers, runs


def _explained(
    config: RunConfig,
    layers: Sequence[Layer],
    facts: HardwareFacts,
    given: Sequence[Derivation] = (),
    title: str = "",
) -> ExplainedRun:
    filled = deepcopy(config)
    try:
        derived, problems = [*given, *_derive(filled, facts)], []
    except ValueError as error:
        filled, derived, problems = config, list(given), [str(error)]
    found = settings(filled, layers, derived)
    note = "" if problems else high_lr_note(filled)
    return ExplainedRun(title=title, stage=config.stage, settings=found, problems=problems, lr_note=note)


def _derive(config: RunConfig, facts: HardwareFacts) -> list[Derivation]:
    """Fill in place what a run fills, by the same functions. A hub is asked for config.json and the tokenizer alone.

    Raises:
        ValueError: as `derive`.
    """
    return _kept(config) + _derive_open(config, facts)


def _kept(config: RunConfig) -> list[Derivation]:
    """What a resumed run keeps; resume=auto is not looked up."""
    place = Path(config.resume or "").expanduser()
    folders = (place, *place.parents[:2]) if config.resume else ()  # a run, or one of its checkpoints
    file = next((f / "derived.json" for f in folders if (f / "derived.json").is_file()), None)
    if file is None:
        return []
    saved = json.loads(file.read_text())
    keys = [entry.partition("=")[0] for entry in keep_derived(config, saved)]
    return [Derivation(key=k, value=saved[k]["value"], reason=f"{_KEPT}: {saved[k]['reason']}") for k in keys]


def _derive_open(config: RunConfig, facts: HardwareFacts) -> list[Derivation]:
    from rlbench.checks.limits import derive_drift_limits
    from rlbench.models.fit import derive_engine_memory, derive_sizes
    from rlbench.models.source import model_place, read_text_config

    derived = derive(config, facts)
    is_gpu = config.hardware.profile == "gpu"
    place = model_place(config.model) if is_gpu else None
    text_config = read_text_config(place) if place else None
    if text_config is not None or not is_gpu:
        derived = derive_sizes(config, facts, text_config, derived)
        longest = _longest_sequence(config, text_config, place, derived)
        derived = derive_engine_memory(config, facts, text_config, longest, derived)
    else:
        derived += list(_left_open(config))
    return derived + (derive_drift_limits(config) if config.stage == "rl" else [])


def _left_open(config: RunConfig) -> Iterator[Derivation]:
    reason = "left to the run's start: it needs the model's config.json, which cannot be had here"
    if config.training.recompute == AUTO:
        yield Derivation(key="training.recompute", value=AUTO, reason=reason)
    if config.stage == "rl" and config.engine.dense_copies is None:
        yield Derivation(key="engine.dense_copies", value=None, reason=reason)


def _longest_sequence(config: RunConfig, text_config: Any, place: str | None, derived: Sequence[Derivation]) -> int:
    """Of a run whose KV cache is derived, found in its rows as the run finds it; else 0, which nothing reads.

    Raises:
        ValueError: the rows or the tokenizer cannot be had, or a prompt is too long: the run could not start.
    """
    if place is None or not any(d.key == "engine.kv_cache_gib" for d in derived):
        return 0
    from transformers import AutoTokenizer

    from rlbench.build import longest_sequence, prompt_sets, read_rows

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"model.path: {place} has no tokenizer that can be read ({reason}); expected one") from error
    rows = read_rows(config)
    return longest_sequence(config, *prompt_sets(config, rows, tokenizer, int(text_config.max_position_embeddings)))


def _selected(run: ExplainedRun, keys: Sequence[str]) -> ExplainedRun:
    chosen = [s for s in run.settings if not keys or any(_is_in(s.key, key) for key in keys)]
    return replace(run, settings=chosen)


def _is_in(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _rows(run: ExplainedRun, keys: Sequence[str], only_changed: bool) -> Iterator[PlanRow]:
    """A key that is named whole gets all that is known of it; the others one line, those that differ first."""
    listed = [s for s in run.settings if s.key not in keys and (s.is_changed or not only_changed)]
    by_section: dict[str, list[Setting]] = {}
    for setting in listed:
        by_section.setdefault(_section(setting.key, run.stage), []).append(setting)
    for section, group in by_section.items():
        for setting in sorted(group, key=lambda s: not s.is_changed):
            mark = "*" if setting.is_changed else " "
            value = shorten(_text(setting.value), _VALUE_CHARS)
            yield PlanRow(section, f"{mark} {setting.key}", value, _origin(setting))
    yield from joined.from_iterable(_detail(s) for s in run.settings if s.key in keys)


def _section(key: str, stage: str) -> str:
    name, dot, _ = key.partition(".")
    if not dot:
        return "run"
    return f"{name} (stage={stage} does not read it)" if name in STAGES[stage] else name


def _detail(setting: Setting) -> Iterator[PlanRow]:
    doc = key_doc(setting.key)
    yield PlanRow(setting.key, "value", _text(setting.value))
    yield PlanRow(setting.key, "from", _origin(setting, is_short=True))
    for name in reversed(setting.layers[:-1]):
        yield PlanRow(setting.key, "over", name)
    if setting.default is not UNDECLARED:
        yield PlanRow(setting.key, "default", _text(setting.default))
    yield PlanRow(setting.key, "meaning", doc.meaning or "(no comment stands beside it)")
    yield PlanRow(setting.key, "type", doc.type)
    yield PlanRow(setting.key, "declared", doc.place)


def _origin(setting: Setting, *, is_short: bool = False) -> str:
    if setting.reason:
        return f"derived: {setting.reason}"
    if not setting.layers:
        return f"default in {schema_file(setting.key)}"
    if not setting.is_changed:
        return f"{setting.layers[-1]}, as by default"
    if is_short or setting.default is UNDECLARED:
        return setting.layers[-1]
    return f"{setting.layers[-1]}; default {shorten(_text(setting.default), _VALUE_CHARS)}"


def _text(value: Any) -> str:
    """As it would be written in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value) if value != value.strip() or not value or "\n" in value else value
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_text(item)}' for name, item in value.items())}}}"
    return str(value)


def _layer_text(layer: Layer) -> str:
    return f"{layer.name} (chosen by {layer.chosen_by})" if layer.chosen_by else layer.name
