"""Reward functions: how a config's name becomes one, and how completions are scored with it.

A reward function is called once a completion, with keyword arguments: `prompt` (str), `completion` (str), `answer`
(str or None) and every field of the prompt's record that is a name Python allows. It returns a finite number. What it does
not accept is not passed: `def reward(completion, answer)` is enough.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np

from rlbridge.errors import ConfigError, RewardError
from rlbridge.rl.prompts import Prompt, shorten

RewardFunction = Callable[..., float]


class RewardRegistry(Protocol):
    """Where named reward functions are found."""

    def load(self, role: Literal["reward"], name: str) -> Any:
        """The reward function that is registered as `name`."""


def resolve_reward(spec: str, registry: RewardRegistry) -> RewardFunction:
    """The function that `spec` names: a registered reward, or `module:function` with the working directory on `sys.path`.

    Raises:
        ConfigError: the module or the function is not there, or is no function.
        PluginError: no registered reward has that name.
    """
    if ":" not in spec:
        return _callable(registry.load("reward", spec), spec)
    module_name, _, function_name = spec.partition(":")
    module = _import(module_name, spec)
    if not hasattr(module, function_name):
        raise ConfigError(
            f"reward {spec!r}: {module.__file__ or module_name} has no {function_name!r}",
            todo=_nearest(function_name, [name for name, value in vars(module).items() if callable(value)]),
        )
    return _callable(getattr(module, function_name), spec)


def score_completions(fn: RewardFunction, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray[Any, Any]:
    """The rewards [B] float32 of `completions`, one a prompt, in order.

    Raises:
        RewardError: the function raised, or gave something that is not a finite number; names the prompt and the completion.
    """
    accepts = _accepted(fn)
    pairs = zip(prompts, completions, strict=True)
    return np.array([_score(fn, accepts, prompt, completion) for prompt, completion in pairs], dtype=np.float32)


def _score(fn: RewardFunction, accepts: Callable[[str], bool], prompt: Prompt, completion: str) -> float:
    known: dict[str, Any] = {**prompt.fields, "prompt": prompt.question, "completion": completion, "answer": prompt.answer}
    try:
        value = fn(**{key: value for key, value in known.items() if accepts(key)})
        reward = _number(value)
    except Exception as error:
        raise RewardError(
            f"the reward function {getattr(fn, '__name__', fn)!s} failed with {type(error).__name__}: {error}\n"
            f"  prompt {prompt.index}: {shorten(prompt.question)!r}\n"
            f"  completion: {shorten(completion)!r}",
            prompt=prompt.source,
        ) from error
    return reward


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"it returned {shorten(repr(value))}, not a number")
    number = float(value)
    # The limit is float32's, since that is what a trainer gets; false for NaN as well.
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(f"it returned {number}, which is not finite in float32")
    return number


def _accepted(fn: RewardFunction) -> Callable[[str], bool]:
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(fn).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return str.isidentifier
    by_name = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_name.__contains__


def _import(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        # Left there: the module may import its neighbours only when it is called.
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and (name == error.name or name.startswith(f"{error.name}."))
        todo = _nearest(name, [path.stem for path in Path.cwd().glob("*.py")]) if absent else "correct the module"
        raise ConfigError(
            f"reward {spec!r}: module {name!r} cannot be imported: {error!r}", todo=todo, directory=here
        ) from error


def _callable(value: Any, spec: str) -> RewardFunction:
    if not callable(value):
        raise ConfigError(f"reward {spec!r} is a {type(value).__name__}, not a function")
    function: RewardFunction = value
    return function


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names))
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "check the spelling of reward.fn"
