"""Where the processes of each role run: under which interpreter, with which variables, forked off what."""

from __future__ import annotations

from pathlib import Path

from rlbridge.env import Place, place
from rlbridge.plugins import registry
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.levels import Role
from rlbridge_conformance.nursery import Nursery
from rlbridge_conformance.triple import Triple

_SERVE = "rlbridge_conformance.processes:serve"
# Recording a loader enters a torch dispatch mode, which imports torch._dynamo: a second in each new engine.
_MODULES = ("rlbridge_conformance.hosts", "torch._dynamo")

_kept: dict[tuple[Path | None, str], Nursery] | None = None


def keep_nurseries() -> None:
    """Let nurseries outlive the run that began them: the next runs in this process fork off the same, to the end of it.

    To start one takes most of a short run. It has imported what the first run asked for; its children import the rest.
    """
    global _kept
    _kept = {}


class Places:
    """The interpreters that a run of the suite needs, each with one nursery, begun when it is first asked for.

    Args:
        triple: The backends of the run: nurseries import them.

    Raises:
        PluginError: a backend is not installed, here or in an environment.
    """

    def __init__(self, triple: Triple) -> None:
        self._nurseries: dict[Path | None, Nursery] = {}
        self._modules: dict[Path | None, list[str]] = {}
        for role in ("trainer", "generator"):
            found = self.of(triple, role)
            if lacks("cuda") is not None:  # a module that looks at CUDA when it is imported breaks in forks
                load = registry().backend(role, triple.choice(role).name).load
                self._modules.setdefault(found.python, []).append(load.partition(":")[0])

    def of(self, triple: Triple, role: Role) -> Place:
        """Where that role of a triple runs."""
        choice = triple.choice(role)
        return place(role, choice.name, triple.validated(role, choice.options).env)

    def nursery(self, place: Place) -> Nursery:
        """What the processes of that place are forked off."""
        if place.python not in self._nurseries:
            self._nurseries[place.python] = self._begin(place)
        return self._nurseries[place.python]

    def _begin(self, place: Place) -> Nursery:
        key = (place.python, repr(sorted(place.variables.items())))
        if _kept is not None and key in _kept:
            return _kept[key]
        begun = Nursery(_SERVE, [*_MODULES, *self._modules.get(place.python, ())], place.python, place.variables)
        if _kept is not None:
            _kept[key] = begun
        return begun

    def close(self) -> None:
        """End the nurseries, unless they are kept."""
        if _kept is None:
            for nursery in self._nurseries.values():
                nursery.close()
        self._nurseries.clear()
