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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

from rlbridge import hookspecs
from rlbridge.backend import Backend
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
}
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
    """One backend as `rlbridge plugins` shows it; `reason` says why it is not importable."""

    role: Role
    name: str
    version: str
    plugin: str
    distribution: str
    capabilities: tuple[str, ...]
    summary: str
    importable: bool
    reason: str


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
        for source in sources:
            try:
                found = self._register(source)
            # A plugin is a stranger's code: whatever it raises, even SystemExit, must not take the other plugins down.
            except (Exception, SystemExit) as error:
                broken = _broken(source, error)
                if strict:
                    raise PluginError(f"broken plugin {broken}", todo=f"{STRICT_VARIABLE}=1 makes this an error") from error
                self.broken.append(broken)
            else:
                for role, backend in found:
                    self._entries[role].append(_Entry(backend, source.name, _shown_distribution(backend, source)))

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

    def listing(self) -> list[Row]:
        """Every backend, in the order of the roles and then of the plugins."""
        return [_row(role, entry) for role, entries in self._entries.items() for entry in entries]

    def _register(self, source: Source) -> list[tuple[Role, Backend]]:
        if self.manager.has_plugin(source.name):
            raise PluginError("another plugin has the same name")
        plugin = source.import_plugin()
        try:
            self.manager.register(plugin, source.name)
            self.manager.check_pending()  # a misspelt hook would otherwise never be called
            return list(self._backends(plugin))
        except BaseException:
            # pluggy leaves a plugin that failed its validation registered, with the hooks that came before the bad one.
            if self.manager.has_plugin(source.name):
                self.manager.unregister(name=source.name)
            raise

    def _backends(self, plugin: object) -> Iterator[tuple[Role, Backend]]:
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        for role in self._entries:
            hook = f"rlbridge_{role}s"
            for backends in self.manager.subset_hook_caller(hook, others)():
                yield from ((role, _checked(backend, hook)) for backend in backends)

    def _unknown(self, role: Role, name: str) -> PluginError:
        entries = {entry.backend.name: entry.backend for entry in self._entries[role]}
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        todo = [f"known: {', '.join(sorted(entries)) or 'none'}"]
        todo += [install_hint(entries[other].extra) for other in near if _missing(entries[other])]
        todo += [install_hint(name)] if name in extras() else []
        todo += [f"or the plugin that brings it is broken: {broken}" for broken in self.broken]
        return PluginError(f"no {role} is named {name!r}{hint}", todo="\n  ".join(filter(None, todo)))


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


def _shown_distribution(backend: Backend, source: Source) -> str:
    return source.distribution if backend.distribution == "rlbridge" else backend.distribution


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
    )
