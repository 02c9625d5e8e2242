"""The config reference, made from the pydantic models each time the docs are built.

    ```{config-section} sampling      every key of a section; `run` stands for the keys above all sections
    ```{config-backends} trainer      for each built-in backend of a role, the keys that only it has

Each key is a `confval`, so other pages link to it, and a key that is gone breaks the build.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Set
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rlbridge.backend import Backend
from rlbridge.config.sections import BACKEND_ROLES, RunConfig, options_model
from rlbridge.plugins import Role, registry

_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_NAMES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}


class ConfigSection(SphinxDirective):
    """Every key of one section."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name == "run":
            fields = {key: field for key, field in RunConfig.model_fields.items() if _section(key) is None}
            return self.parse_text_to_nodes("\n".join(_entries("", fields)))
        section = _section(name)
        if section is None:
            raise self.error(f"the config has no section {name!r}")
        return self.parse_text_to_nodes("\n".join(_entries(f"{name}.", section.model_fields)))


class ConfigBackends(SphinxDirective):
    """For each built-in backend of a role, its own keys."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        role = self.arguments[0]
        if role not in BACKEND_ROLES:
            raise self.error(f"the backends of {role!r} have no options")
        text: list[str] = []
        described = set(BACKEND_ROLES[role].model_fields)
        for backend in built_in(role):
            own = own_fields(role, backend.name)
            text += [f"**`{role}.backend: {backend.name}`**: {backend.summary.rstrip('.')}.", ""]
            text += _entries(f"{role}.", own, described) if own else ["It has no keys of its own.", ""]
            described |= own.keys()
        return self.parse_text_to_nodes("\n".join(text))


def built_in(role: Role) -> list[Backend]:
    """The backends of `role` that come with rlbridge, whatever else is installed."""
    rows = [row for row in registry().listing() if row.role == role and row.distribution == "rlbridge"]
    return [registry().backend(role, row.name) for row in rows]


def own_fields(role: Role, backend: str) -> dict[str, FieldInfo]:
    """The fields of a backend's options that the role's own model has not, or has otherwise."""
    common = BACKEND_ROLES[role].model_fields
    fields = options_model(role, backend).model_fields
    return {key: field for key, field in fields.items() if key not in common or repr(field) != repr(common[key])}


def _section(name: str) -> type[BaseModel] | None:
    """The model of a section, None for a key that is none."""
    if name in BACKEND_ROLES:
        return BACKEND_ROLES[name]
    return _model(RunConfig.model_fields[name].annotation) if name in RunConfig.model_fields else None


def _entries(prefix: str, fields: dict[str, FieldInfo], described: Set[str] = frozenset()) -> Iterator[str]:
    """The keys as directives; a name that is `described` already, by another backend, is no target of links again."""
    for key, field in fields.items():
        model = _model(field.annotation)
        if model is not None:
            yield from _entries(f"{prefix}{key}.", model.model_fields)
            continue
        yield from (
            f"```{{confval}} {prefix}{key}",
            f":type: {_type(field.annotation, field.metadata)}",
            f":default: {_default(field)}",
            *([":no-index:"] if key in described else []),
            "",
            str(field.description),
            "```",
            "",
        )


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none, it is required" if value is PydanticUndefined else f"`{json.dumps(value, default=str)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    limits = [
        words.format(f"{value:g}")
        for constraint in metadata
        for name, words in _LIMITS.items()
        if (value := getattr(constraint, name, None)) is not None
    ]
    return ", ".join([_base_type(annotation), *limits])


def _base_type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0], [c for extra in arguments[1:] for c in getattr(extra, "metadata", [extra])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_base_type, arguments))
    if origin is list:
        return f"list of: {_base_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}, each a {_base_type(arguments[0])}"
    if origin is dict:
        return f"keys and values, each a {_base_type(arguments[1])}"
    return _NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)).lower())


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-section", ConfigSection)
    app.add_directive("config-backends", ConfigBackends)
    return {"parallel_read_safe": True}
