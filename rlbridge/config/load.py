"""From a YAML file and dotted overrides to a `RunConfig`, with one error that lists everything that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlbridge.config.sections import BACKEND_ROLES, RunConfig, default_backend, options_model
from rlbridge.errors import ConfigError
from rlbridge.plugins import Role

_LONGEST_VALUE = 60


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the YAML file `path`, with `overrides` of the form "section.key=value" (the value is YAML) on top.

    Relative paths in it stay relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, an override is malformed, or keys or values are wrong; all of them are listed.
    """
    data = _read(path)
    for override in overrides:
        apply_override(data, override)
    # `sampling:` with nothing below it is null in YAML, and means the defaults.
    data = {key: value for key, value in data.items() if value is not None}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [describe(detail, data) for detail in error.errors(include_url=False)]
    raise ConfigError("\n  ".join([f"{path} cannot be used:", *problems]))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the config {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_line(error)} is not YAML: {_yaml_problem(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a config: it holds {_shown(data)}, not sections of keys")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set what the dotted `override` ("section.key=value", the value in YAML) names.

    Raises:
        ConfigError: it is malformed.
    """
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"the override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of the override {override!r} is not YAML: {_yaml_problem(error)}") from error
    place = data
    for depth, part in enumerate(path[:-1], start=1):
        section = {} if place.get(part) is None else place[part]
        if not isinstance(section, dict):
            raise ConfigError(f"the override {override!r}: {'.'.join(path[:depth])} is {_shown(section)}, not a section")
        # A copy: a YAML alias makes one object of two sections, and the override is meant for one of them.
        place[part] = dict(section)
        place = place[part]
    place[path[-1]] = value


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}," if mark else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def describe(detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    """One problem that pydantic found in the config `data`, in one line: the key, what is wrong, the nearest that is right."""
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"{place}: required"
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key{_did_you_mean(detail['loc'], data)}"
    if detail["type"] == "model_type":
        return f"{place}: has to be a section of keys, not {_shown(detail['input'])}"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    if detail["type"] == "rlbridge":
        return f"{place}: {message}".replace("\n", "\n  ")
    return f"{place}: {message}, not {_shown(detail['input'])}"


def _did_you_mean(loc: tuple[int | str, ...], data: Mapping[str, Any]) -> str:
    model = _model_at(loc[:-1], data)
    near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1) if model else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _model_at(loc: tuple[int | str, ...], data: Mapping[str, Any]) -> type[BaseModel] | None:
    model: type[BaseModel] = RunConfig
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        inner = _backend_model(part, data) if model is RunConfig and part in BACKEND_ROLES else field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return model


def _backend_model(section: int | str, data: Mapping[str, Any]) -> type[BaseModel]:
    role = cast(Role, section)
    return options_model(role, str(data[role].get("backend", default_backend(role))))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
