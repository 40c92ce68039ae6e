"""A dotted path becomes a reward: a class of ours, a function, or a TRL-style function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlbench_rewards.contract import Reward, RewardError, RewardOutput, RewardSample

OWN_PREFIX = "rlbench_rewards."


def load_reward(name: str, path: str, kwargs: Mapping[str, Any], allowed_prefixes: Sequence[str] = ()) -> Reward:
    """Import and build the reward `name`.

    Args:
        name: of the component, for messages.
        path: "package.module.Name" of a class, a function of RewardSample, or a TRL-style function
            `func(completions, **columns) -> list[float]`.
        kwargs: of the class's constructor, or fixed keyword arguments of a function.
        allowed_prefixes: what `path` may begin with besides "rlbench_rewards.".

    Raises:
        ValueError: one sentence that names the key.
    """
    key = f"rewards.components.{name}"
    if not any(path.startswith(prefix) for prefix in (OWN_PREFIX, *allowed_prefixes)):
        raise ValueError(
            f"{key}.path is {path}, which may not be imported; expected it to begin with {OWN_PREFIX} or with one of "
            f"rewards.allowed_prefixes ({', '.join(allowed_prefixes) or 'none'})"
        )
    target = _find(key, path)
    if inspect.isclass(target):
        reward = _call(key, path, target, kwargs)
        if not callable(reward):
            raise ValueError(f"{key}.path is {path}, whose instances cannot be called; expected a class with __call__")
        return cast(Reward, reward)
    if not callable(target):
        raise ValueError(f"{key}.path is {path}, a {type(target).__name__}; expected a class or a function")
    return _function_reward(key, path, target, kwargs)


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
    return target(**kwargs)


def _function_reward(key: str, path: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Reward:
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return _trl_reward(function, kwargs)
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len([p for p in required if p.name not in kwargs]) != 1:
        raise ValueError(
            f"{key}.path is {path}{inspect.signature(function)}; expected a function of one RewardSample, or a "
            "TRL-style function(completions, **columns)"
        )
    return lambda sample: function(sample, **kwargs)


def _trl_reward(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Reward:
    """TRL calls with lists and gets a list back; ours are lists of one."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def reward(sample: RewardSample) -> RewardOutput:
        columns = {"prompts": [sample.prompt], **{name: [value] for name, value in sample.columns.items()}}
        passed = {name: value for name, value in columns.items() if takes_all or name in parameters}
        values = function(completions=[sample.completion], **{**passed, **kwargs})
        if not isinstance(values, (list, tuple)) or len(values) != 1:
            raise RewardError(f"the function returned {values!r} for one completion, expected a list of one number")
        return RewardOutput(value=values[0])

    return reward
