"""What runs in a process of a stage: a run's own actor of a trainer rank or an engine, and a way to reach into it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from rlbridge.cluster.actors import GeneratorActor, TrainerActor
from rlbridge.errors import RlbridgeError
from rlbridge.importing import import_target
from rlbridge.plugins import registry
from rlbridge.roles.trainer import Trainer
from rlbridge.sync.engine import Engine
from rlbridge.sync.publisher import Publisher

_SUITE = Path(__file__).parent


class TrainerHost(TrainerActor):
    """A trainer rank; see `rlbridge.cluster.actors`. `protocol` may name another Publisher class as "module:Class"."""

    def __init__(self, backend: str, protocol: str = "") -> None:
        super().__init__(backend)
        if protocol:
            self.publisher = import_target(protocol, "the publisher")  # type: ignore[misc]

    def handle(self, method: str, payload: bytes) -> list[bytes]:
        """`call`, as a `ProcessParty` knows it."""
        return self.call(method, payload)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns of this object, in this process."""
        return _applied(function, self, *args)

    @property
    def trainer(self) -> Trainer[Any]:
        """The backend under test."""
        return self._training()

    @property
    def published(self) -> Publisher:
        """Its publisher."""
        return self._publishing()


class GeneratorHost(GeneratorActor):
    """An engine; see `rlbridge.cluster.actors`. `protocol` may name another Engine class as "module:Class"."""

    def __init__(self, backend: str, protocol: str = "") -> None:
        super().__init__(backend)
        if protocol:
            self.engine = import_target(protocol, "the engine")  # type: ignore[misc]

    def handle(self, method: str, payload: bytes) -> list[bytes]:
        """`call`, as a `ProcessParty` knows it."""
        found: list[bytes] = self.call(method, payload, [])
        return found

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns of this object, in this process, also while it generates."""
        return _applied(function, self, *args)

    @property
    def serving(self) -> Engine:
        """The guarded engine; its `generator` is the backend under test."""
        return self._serving()


def host(kind: type[Any], backend: str, protocol: str, env: Mapping[str, str], prepare: Callable[[], None] | None) -> Any:
    """Build a host in a plain process: its variables first, and what `prepare` does to the process before any thread starts."""
    os.environ.update(env)
    registry.cache_clear()
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    return kind(backend, protocol)


def _applied(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns. What a backend raises in it is an error of ours, of whatever type."""
    try:
        return function(*args)
    except RlbridgeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(_SUITE):
            raise
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        told = RlbridgeError(f"the backend raised {type(error).__name__} in {place}: {error}")
        raise told.raised_by("".join(traceback.format_exception(error)).rstrip()) from error
