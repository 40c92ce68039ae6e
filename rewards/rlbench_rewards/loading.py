"""A dotted path becomes a reward: a class, a function of one sample, or a TRL-style function, plain or async."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample

OWN_PREFIX = "rlbench_rewards."
_TRL_PASSED = ("prompts", "completions")
_TRL_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # what its trainer passes besides


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward behind one interface: outputs for a batch of samples, in order.

    `target` is the instance or the function that the user wrote.
    """

    name: str
    target: Any
    score: Callable[[Sequence[RewardSample]], list[Any]]


def load_reward(
    name: str,
    path: str,
    kwargs: Mapping[str, Any],
    allowed_prefixes: Sequence[str] = (),
    *,
    columns: Sequence[str] | None = None,
    as_messages: bool = False,
) -> LoadedReward:
    """Import and build the reward `name`.

    Args:
        name: of the component, for messages.
        path: "package.module.Name" of a class, a function of RewardSample, or a TRL-style function
            `func(completions, **columns) -> list[float]`.
        kwargs: of the class's constructor, or fixed keyword arguments of a function.
        allowed_prefixes: what `path` may begin with besides "rlbench_rewards.".
        columns: names of the data's columns; a column that the reward needs and that is not among them is an error.
            None: not known yet.
        as_messages: a TRL-style function gets completions and prompts as lists of chat messages.

    Raises:
        ValueError: one sentence that names the key.
    """
    key = f"rewards.components.{name}"
    if not any(path.startswith(prefix) for prefix in (OWN_PREFIX, *allowed_prefixes)):
        raise ValueError(
            f"{key}.path is {path}, which may not be imported; expected it to begin with {OWN_PREFIX} or with one of "
            f"rewards.allowed_prefixes ({', '.join(allowed_prefixes) or 'none'})"
        )
    target, fixed = _find(key, path), dict(kwargs)
    if inspect.isclass(target):
        target, fixed = _call(key, path, target, kwargs), {}
        if not callable(target) and not hasattr(target, "score_batch"):
            raise ValueError(f"{key}.path is {path}, whose instances cannot be called; expected a class with __call__")
    elif not callable(target):
        raise ValueError(f"{key}.path is {path}, a {type(target).__name__}; expected a class or a function")
    _check_columns(key, path, getattr(target, "required_columns", ()), columns)
    if hasattr(target, "score_batch"):
        return LoadedReward(name, target, lambda samples: _awaited(target.score_batch(samples)))
    parameters = inspect.signature(target).parameters
    if "completions" in parameters:
        needed = _needed_columns(parameters, fixed)
        _check_trainers_arguments(key, path, needed, columns or ())
        _check_columns(key, path, needed, columns)
        return LoadedReward(name, target, _trl_scorer(target, parameters, fixed, as_messages))
    _check_takes_one_sample(key, path, parameters, fixed)
    return LoadedReward(name, target, lambda samples: _one_by_one(target, samples, fixed))


def _find(key: str, path: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{key}.path is {path}, but {module_name} cannot be imported ({error})") from error
    if hasattr(module, attribute):
        return getattr(module, attribute)
    public = [n for n in vars(module) if not n.startswith("_")]
    guess = difflib.get_close_matches(attribute, public, n=3)
    hint = f"; nearest names: {', '.join(guess)}" if guess else ""
    raise ValueError(f"{key}.path is {path}, but {module_name} has no {attribute}{hint}")


def _call(key: str, path: str, target: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(target).bind(**kwargs)
    except TypeError as error:
        expected = inspect.signature(target)
        raise ValueError(f"{key}.kwargs do not fit {path}{expected} ({error})") from error
    try:
        return target(**kwargs)
    except ValueError as error:
        raise ValueError(f"{key}.kwargs: {error}") from error


def _check_columns(key: str, path: str, needed: Sequence[str], columns: Sequence[str] | None) -> None:
    missing = [name for name in needed if columns is not None and name not in columns]
    if missing:
        raise ValueError(
            f"{key}.path is {path}, which needs the column {missing[0]!r}, but the data has "
            f"{', '.join(columns or ()) or 'none'}"
        )


def _check_trainers_arguments(key: str, path: str, needed: Sequence[str], columns: Sequence[str]) -> None:
    wanted = [name for name in needed if name in _TRL_TRAINERS and name not in columns]
    if wanted:
        raise ValueError(
            f"{key}.path is {path}, which needs {wanted[0]!r} of TRL's trainer; expected a function of "
            "completions, prompts and columns of the data"
        )


def _needed_columns(parameters: Mapping[str, inspect.Parameter], fixed: Mapping[str, Any]) -> list[str]:
    """Parameters of a TRL-style function that only a column can fill."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        p.name
        for p in parameters.values()
        if p.kind in named and p.default is p.empty and p.name not in fixed and p.name not in _TRL_PASSED
    ]


def _check_takes_one_sample(
    key: str, path: str, parameters: Mapping[str, inspect.Parameter], fixed: Mapping[str, Any]
) -> None:
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in fixed
    ]
    unknown = [name for name in fixed if name not in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if len(required) != 1 or required[0].kind is inspect.Parameter.KEYWORD_ONLY or (unknown and not takes_any):
        signature = ", ".join(str(p) for p in parameters.values())
        raise ValueError(
            f"{key}.path is {path}({signature}) with kwargs {', '.join(fixed) or 'none'}; expected a function of one "
            "RewardSample, or a TRL-style function(completions, **columns)"
        )


def _one_by_one(function: Any, samples: Sequence[RewardSample], fixed: Mapping[str, Any]) -> list[Any]:
    first = [function(sample, **fixed) for sample in samples]
    if not any(inspect.isawaitable(result) for result in first):
        return first

    async def gather() -> list[Any]:
        return list(await asyncio.gather(*first))

    return asyncio.run(gather())


def _awaited(result: Any) -> Any:
    """The result of a plain or an async call."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    return asyncio.run(wait())


def _trl_scorer(
    function: Any, parameters: Mapping[str, inspect.Parameter], fixed: Mapping[str, Any], as_messages: bool
) -> Callable[[Sequence[RewardSample]], list[Any]]:
    """TRL calls with lists and gets a list back. A None in it means that the function does not apply to the sample."""
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def as_given(text: str, role: str) -> Any:
        return [{"role": role, "content": text}] if as_messages else text

    def score(samples: Sequence[RewardSample]) -> list[Any]:
        columns: dict[str, Any] = {
            name: [sample.columns.get(name) for sample in samples] for sample in samples for name in sample.columns
        }
        columns["prompts"] = [as_given(sample.prompt, "user") for sample in samples]
        passed = {name: value for name, value in columns.items() if takes_all or name in parameters}
        completions = [as_given(sample.completion, "assistant") for sample in samples]
        values = _awaited(function(**{**passed, "completions": completions, **fixed}))
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        if not isinstance(values, (list, tuple)) or len(values) != len(samples):
            got = f"{len(values)} values" if isinstance(values, (list, tuple)) else repr(values)[:100]
            raise RewardError(f"the function returned {got} for {len(samples)} completions, expected a list as long")
        return [RewardOutput(value=_plain(value)) for value in values]

    return score


def _plain(value: Any) -> Any:
    """A truth value or a numpy or torch scalar as a Python number, as in TRL; all else as it is, to be checked."""
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, bool) else value
