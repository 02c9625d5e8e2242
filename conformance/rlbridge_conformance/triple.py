"""The trainer, the generator and the transport under test, and the suite's own in the place of those that nobody named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, overload

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlbridge.backend import Backend
from rlbridge.config.load import describe
from rlbridge.errors import ConfigError
from rlbridge.importing import import_target, is_target
from rlbridge.plugins import registry
from rlbridge_conformance.levels import ROLES, Role
from rlbridge_conformance.requirements import (
    GeneratorRequirements,
    Requirements,
    TrainerRequirements,
    TransportRequirements,
)

REFERENCE = "reference"

_BASES: dict[Role, type[Requirements]] = {
    "trainer": TrainerRequirements,
    "generator": GeneratorRequirements,
    "transport": TransportRequirements,
}


@dataclass(frozen=True)
class Choice:
    """One role's backend by name, and the options that the user gave it."""

    name: str = REFERENCE
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, options: Mapping[str, Any]) -> Choice:
        """The same backend, with options that come before the user's."""
        return replace(self, options={**options, **self.options})


@dataclass(frozen=True)
class Triple:
    """A backend for each role.

    Attributes:
        tested: The roles that the user named: the suite holds those to their contracts.
        requirements: Classes that take the place of those that the backends name, by role.
    """

    trainer: Choice = Choice()
    generator: Choice = Choice()
    transport: Choice = Choice()
    tested: frozenset[Role] = frozenset()
    requirements: Mapping[Role, type[Requirements]] = field(default_factory=dict)

    def choice(self, role: Role) -> Choice:
        """The role's backend."""
        found: Choice = getattr(self, role)
        return found

    def backend(self, role: Role) -> Backend:
        """What the plugin registered.

        Raises:
            PluginError: there is no such backend.
        """
        return registry().backend(role, self.choice(role).name)

    @overload
    def claims(self, role: Literal["trainer"]) -> TrainerRequirements: ...
    @overload
    def claims(self, role: Literal["generator"]) -> GeneratorRequirements: ...
    @overload
    def claims(self, role: Literal["transport"]) -> TransportRequirements: ...
    @overload
    def claims(self, role: Role) -> Requirements: ...

    def claims(self, role: Role) -> Requirements:
        """The role's requirements.

        Raises:
            PluginError: the class that the backend names cannot be imported.
            ConfigError: it is none for this role.
        """
        backend = self.backend(role)
        found = self.requirements.get(role) or (
            import_target(backend.requirements, f"the requirements of the {role} {backend.name!r}")
            if backend.requirements
            else _BASES[role]
        )
        if not (isinstance(found, type) and issubclass(found, _BASES[role])):
            raise ConfigError(f"{found!r} is no {_BASES[role].__name__}", todo="derive it from that class")
        return found(backend)

    def only(self, role: Role) -> Triple:
        """This role's backend between the suite's own."""
        others = {other: Choice() for other in ROLES if other != role}
        return replace(self, **others, tested=frozenset({role}))  # type: ignore[arg-type]

    def validated(self, role: Role, options: Mapping[str, Any]) -> Any:
        """The backend's options model, filled from `options`.

        Raises:
            ConfigError: the backend does not know an option, or a value; all of them are listed.
        """
        name = self.choice(role).name
        try:
            return registry().options_model(role, name).model_validate({"backend": name, **options})
        except ValidationError as error:
            data: dict[str, Any] = {role: {"backend": name, **options}}
            found = [cast("ErrorDetails", {**e, "loc": (role, *e["loc"])}) for e in error.errors(include_url=False)]
            wrong = [describe(each, data) for each in found]
        known = ", ".join(key for key in registry().options_model(role, name).model_fields if key != "backend")
        raise ConfigError(
            "\n  ".join([f"the options of the {role} {name!r} cannot be used:", *wrong]),
            todo=f"its options: {known}" if known else "it has no options",
        )


def requirements_by_role(classes: Sequence[str]) -> dict[Role, type[Requirements]]:
    """The classes that "module:Class" texts name, by the role whose base each has.

    Raises:
        ConfigError: one has none of the three bases.
        PluginError: one cannot be imported.
    """
    found: dict[Role, type[Requirements]] = {}
    for target in classes:
        if not is_target(target):
            raise ConfigError(f"{target!r} names no requirements class", todo="write it as module:Class")
        imported = import_target(target, "the requirements class")
        roles = [role for role, base in _BASES.items() if isinstance(imported, type) and issubclass(imported, base)]
        if not roles:
            raise ConfigError(
                f"{target} is no requirements class",
                todo="derive it from TrainerRequirements, GeneratorRequirements or TransportRequirements",
            )
        found[roles[0]] = imported
    return found
