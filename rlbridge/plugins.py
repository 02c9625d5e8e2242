"""Finding backends by name: plugins are discovered once a process, and a backend is imported only when it is asked for.

A plugin that cannot be imported or registered is kept as `Broken`, and only matters to whoever asks for what it would have
brought. With `RLBRIDGE_STRICT_PLUGINS=1` it is an error at once. `RLBRIDGE_PLUGINS` names further modules, separated by commas:
for plugins that are no installed distribution.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

from rlbridge import hookspecs
from rlbridge.backend import Backend
from rlbridge.environment import Environment
from rlbridge.errors import PluginError
from rlbridge.importing import distribution_version, extras, import_target, install_hint, is_target, missing_module

if TYPE_CHECKING:
    from pydantic import BaseModel

Role = Literal["trainer", "generator", "transport", "reward", "model"]

ENTRY_POINT_GROUP = "rlbridge"
STRICT_VARIABLE = "RLBRIDGE_STRICT_PLUGINS"
MODULES_VARIABLE = "RLBRIDGE_PLUGINS"

_BUILT_IN = {
    "rlbridge_core": "rlbridge.rl.builtin_rewards",
    "rlbridge_native": "rlbridge_native",
    "rlbridge_nixl": "rlbridge_nixl",
    "rlbridge_ray": "rlbridge_ray",
    "rlbridge_vllm": "rlbridge_vllm",
    "rlbridge_sglang": "rlbridge_sglang",
    "rlbridge_openai": "rlbridge_openai",
    "rlbridge_verl": "rlbridge_verl",
    "rlbridge_openrlhf": "rlbridge_openrlhf",
}
_ENVIRONMENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # it begins the name of a directory
_FILE_TARGET = re.compile(r"[^\W\d][\w.]*:[\w][\w./-]*")
_BASE_OPTIONS = {
    "trainer": "rlbridge.roles.trainer:TrainerOptions",
    "generator": "rlbridge.roles.generator:GeneratorOptions",
    "transport": "rlbridge.roles.transport:TransportOptions",
}


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be imported or registered, or whose role hooks failed, and why."""

    name: str
    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        brought_by = f"{self.distribution} {self.version}".strip()
        return f"{self.name} ({brought_by}): {self.reason}" if brought_by else f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """One backend as `rlbridge plugins` shows it; `reason` says why it is not importable, `environments` where it would be."""

    role: Role
    name: str
    version: str
    plugin: str
    distribution: str
    capabilities: tuple[str, ...]
    summary: str
    importable: bool
    reason: str
    environments: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from: `import_plugin` gives the module, or any object, whose functions implement hooks."""

    name: str
    distribution: str
    import_plugin: Callable[[], object]


@dataclass(frozen=True)
class _Entry:
    backend: Backend
    plugin: str
    distribution: str


@functools.cache
def registry() -> Registry:
    """The process's one registry: built-in plugins, those that `RLBRIDGE_PLUGINS` names, the entry-point group `rlbridge`.

    Raises:
        PluginError: a plugin is broken, and `RLBRIDGE_STRICT_PLUGINS` is 1.
    """
    sources = [*_built_in_sources(), *_named_sources(), *_entry_point_sources()]
    return Registry(sources, strict=os.environ.get(STRICT_VARIABLE) == "1")


class Registry:
    """All backends by role and name.

    Attributes:
        manager: The plugin manager; lifecycle hooks are called on `manager.hook`.
        broken: The plugins that could not be used.
    """

    def __init__(self, sources: list[Source], *, strict: bool = False) -> None:
        self.manager = pluggy.PluginManager("rlbridge")
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[Broken] = []
        self._entries: dict[Role, list[_Entry]] = {role: [] for role in get_args(Role)}
        self._environments: list[tuple[Environment, str]] = []
        for source in sources:
            try:
                found, environments = self._register(source)
            # A plugin is a stranger's code: whatever it raises, even SystemExit, must not take the other plugins down.
            except (Exception, SystemExit) as error:
                broken = _broken(source, error)
                if strict:
                    raise PluginError(f"broken plugin {broken}", todo=f"{STRICT_VARIABLE}=1 makes this an error") from error
                self.broken.append(broken)
            else:
                for role, backend in found:
                    self._entries[role].append(_Entry(backend, source.name, _shown_distribution(backend, source)))
                for environment in environments:
                    brought_by = _shown_distribution(environment, source) or "rlbridge"
                    self._environments.append((replace(environment, distribution=brought_by), source.name))

    def backend(self, role: Role, name: str) -> Backend:
        """The backend of that name.

        Raises:
            PluginError: there is none, or two plugins bring one.
        """
        found = [entry for entry in self._entries[role] if entry.backend.name == name]
        if len(found) > 1:
            plugins = " and ".join(f"{entry.plugin} ({entry.distribution})" for entry in found)
            raise PluginError(f"the {role} {name!r} is registered twice, by {plugins}", todo="uninstall one of them")
        if not found:
            raise self._unknown(role, name)
        return found[0].backend

    def load(self, role: Role, name: str) -> Any:
        """The class or function that the backend names, imported.

        Raises:
            PluginError: it is unknown, what it requires is not installed, or its import failed.
        """
        backend = self.backend(role, name)
        if reason := self.missing(role, name):
            raise PluginError(f"the {role} {name!r} is not installed: {reason}", todo=install_hint(backend.extra))
        return import_target(backend.load, f"the {role} {name!r}", install_hint(backend.extra))

    def options_model(self, role: Role, name: str) -> type[BaseModel]:
        """The pydantic model of the backend's config section; the role's own where the backend names none.

        Raises:
            PluginError: the backend is unknown, or its model cannot be imported.
        """
        from pydantic import BaseModel

        target = self.backend(role, name).options or _BASE_OPTIONS.get(role, "")
        if not target:
            raise PluginError(f"the {role} {name!r} takes no options")
        model = import_target(target, f"the options of the {role} {name!r}")
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise PluginError(f"the options of the {role} {name!r}, {target}, are no pydantic model")
        return model

    def missing(self, role: Role, name: str) -> str | None:
        """Why the backend could not be imported here, or None. Looks for modules and imports none."""
        return _missing(self.backend(role, name))

    def environment(self, name: str) -> Environment:
        """The environment of that name.

        Raises:
            PluginError: there is none, or two plugins bring one.
        """
        found = [(environment, plugin) for environment, plugin in self._environments if environment.name == name]
        if len(found) > 1:
            plugins = " and ".join(plugin for _, plugin in found)
            raise PluginError(f"the environment {name!r} is registered twice, by {plugins}", todo="uninstall one of them")
        if not found:
            known = sorted({environment.name for environment, _ in self._environments})
            raise PluginError(f"no environment is named {name!r}{_did_you_mean(name, known)}", todo=self._known(known))
        return found[0][0]

    def environments(self) -> list[Environment]:
        """Every environment, in the order of the plugins."""
        return [environment for environment, _ in self._environments]

    def listing(self) -> list[Row]:
        """Every backend, in the order of the roles and then of the plugins."""
        return [_row(role, entry) for role, entries in self._entries.items() for entry in entries]

    def _register(self, source: Source) -> tuple[list[tuple[Role, Backend]], list[Environment]]:
        if self.manager.has_plugin(source.name):
            raise PluginError("another plugin has the same name")
        plugin = source.import_plugin()
        try:
            self.manager.register(plugin, source.name)
            self.manager.check_pending()  # a misspelt hook would otherwise never be called
            return list(self._backends(plugin)), list(self._environments_of(plugin))
        except BaseException:
            # pluggy leaves a plugin that failed its validation registered, with the hooks that came before the bad one.
            if self.manager.has_plugin(source.name):
                self.manager.unregister(name=source.name)
            raise

    def _backends(self, plugin: object) -> Iterator[tuple[Role, Backend]]:
        for role in self._entries:
            hook = f"rlbridge_{role}s"
            yield from ((role, _checked(backend, hook)) for backend in self._answers(plugin, hook))

    def _environments_of(self, plugin: object) -> Iterator[Environment]:
        hook = "rlbridge_environments"
        yield from (_checked_environment(environment, hook) for environment in self._answers(plugin, hook))

    def _answers(self, plugin: object, hook: str) -> Iterator[object]:
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        for answer in self.manager.subset_hook_caller(hook, others)():
            yield from answer

    def _unknown(self, role: Role, name: str) -> PluginError:
        entries = {entry.backend.name: entry.backend for entry in self._entries[role]}
        hints = [install_hint(entries[other].extra) for other in _near(name, entries) if _missing(entries[other])]
        hints += [install_hint(name)] if name in extras() else []
        return PluginError(f"no {role} is named {name!r}{_did_you_mean(name, entries)}", todo=self._known(entries, hints))

    def _known(self, names: Iterable[str], hints: Iterable[str] = ()) -> str:
        broken = [f"or the plugin that brings it is broken: {broken}" for broken in self.broken]
        return "\n  ".join(filter(None, [f"known: {', '.join(sorted(names)) or 'none'}", *hints, *broken]))


def _built_in_sources() -> Iterator[Source]:
    for name, module in _BUILT_IN.items():
        yield Source(name, "rlbridge", functools.partial(importlib.import_module, module))


def _named_sources() -> Iterator[Source]:
    for module in filter(None, map(str.strip, os.environ.get(MODULES_VARIABLE, "").split(","))):
        yield Source(module, "", functools.partial(importlib.import_module, module))


def _entry_point_sources() -> Iterator[Source]:
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        yield Source(entry.name, entry.dist.name if entry.dist else "", entry.load)


def _broken(source: Source, error: BaseException) -> Broken:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Broken(source.name, source.distribution, distribution_version(source.distribution), reason)


def _checked(backend: object, hook: str) -> Backend:
    if not isinstance(backend, Backend):
        raise PluginError(f"{hook} returned {backend!r}, which is no rlbridge.Backend")
    for target in filter(None, (backend.load, backend.options, backend.requirements)):
        if not is_target(target):
            raise PluginError(f"{hook}: {target!r} of the backend {backend.name!r} is not of the form module:attribute")
    return backend


def _checked_environment(environment: object, hook: str) -> Environment:
    if not isinstance(environment, Environment):
        raise PluginError(f"{hook} returned {environment!r}, which is no rlbridge.Environment")
    if not _ENVIRONMENT_NAME.fullmatch(environment.name):
        raise PluginError(f"{hook}: {environment.name!r} is no name for an environment: a-z, 0-9, dots and dashes are")
    for target in filter(None, (environment.lock or "no lock", environment.site)):
        if not _FILE_TARGET.fullmatch(target):
            raise PluginError(f"{hook}: {target!r} of the environment {environment.name!r} is not of the form package:file")
    for field in ("requirements", "overrides", "no_deps", "resolved", "modules"):
        if isinstance(getattr(environment, field), str):
            raise PluginError(f"{hook}: {field} of the environment {environment.name!r} is a string, and no tuple of them")
    return environment


def _near(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = _near(name, names)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _shown_distribution(brought: Backend | Environment, source: Source) -> str:
    return source.distribution if brought.distribution == "rlbridge" else brought.distribution


def _missing(backend: Backend) -> str | None:
    for module in (*backend.requires, backend.load.partition(":")[0]):
        if absent := missing_module(module):
            return f"no module named {absent!r}"
    return None


def _row(role: Role, entry: _Entry) -> Row:
    backend = entry.backend
    reason = _missing(backend)
    return Row(
        role=role,
        name=backend.name,
        version=distribution_version(entry.distribution),
        plugin=entry.plugin,
        distribution=entry.distribution,
        capabilities=tuple(sorted(backend.capabilities)),
        summary=backend.summary,
        importable=reason is None,
        reason=reason or "",
        environments=backend.environments,
        tested=backend.tested,
    )
