"""A Ray cluster for one run: one of its own on this machine, or one that it joins; and what may be asked of it."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from rlbridge.errors import ResourceError
from rlbridge.roles.options import Resources

_STARTS = 3


@dataclass(frozen=True)
class Ask:
    """`actors` actors of a role, each with `resources`."""

    role: str
    actors: int
    resources: Resources

    def totals(self) -> dict[str, float]:
        """The sum over the actors, in Ray's names."""
        each = {"CPU": self.resources.cpus, "GPU": self.resources.gpus}
        if self.resources.accelerator:
            each[f"accelerator_type:{self.resources.accelerator}"] = 0.001  # what Ray takes of it for an actor
        return {name: amount * self.actors for name, amount in each.items() if amount}


@contextlib.contextmanager
def cluster(asks: Sequence[Ask], address: str | None, temp_dir: Path | None = None) -> Iterator[bool]:
    """Ray, connected, with room for `asks`; yields whether it is this run's own. A process that is connected already stays so.

    Raises:
        ResourceError: the cluster has less than is asked, says how much; or it cannot be started or reached.
    """
    own = address is None
    if ray.is_initialized():
        check_room(asks)
        yield False
        return
    if own:
        start_ray(max(os.cpu_count() or 1, math.ceil(_sum(asks).get("CPU", 0.0))), temp_dir)
    else:
        _join(str(address))
    try:
        check_room(asks)
        yield own
    finally:
        ray.shutdown()


def check_room(asks: Sequence[Ask]) -> None:
    """Compare what is asked with what the cluster has in all, and with what is free.

    Raises:
        ResourceError: there is too little.
    """
    wanted = _sum(asks)
    there, free = ray.cluster_resources(), ray.available_resources()
    short = {name: amount for name, amount in wanted.items() if there.get(name, 0.0) + 1e-6 < amount}
    taken = {name: amount for name, amount in wanted.items() if free.get(name, 0.0) + 1e-6 < amount}
    if not short and not taken:
        return
    asked = "; ".join(f"{a.role} {a.actors} x {_words(_each(a))}" for a in asks)
    lacking = short or taken
    has = _words({name: (there if short else free).get(name, 0.0) for name in lacking})
    raise ResourceError(
        f"the run asks for {_words({n: wanted[n] for n in lacking})} in all ({asked}), and the cluster has {has}"
        + ("" if short else " free"),
        todo="ask for less (trainer.workers, generator.workers, *.resources), or join a larger cluster (cluster.address)",
    )


def _each(ask: Ask) -> dict[str, float]:
    return {name: amount / max(ask.actors, 1) for name, amount in ask.totals().items()}


def _sum(asks: Sequence[Ask]) -> dict[str, float]:
    total: dict[str, float] = {}
    for ask in asks:
        for name, amount in ask.totals().items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _words(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(amounts.items())) or "nothing"


def start_ray(cpus: int, temp_dir: Path | None) -> None:
    """Start a cluster on this machine that gives out `cpus` cores, and connect to it.

    Ray waits a fixed 30 s for its raylet, so a loaded machine may need another try.

    Raises:
        ResourceError: it did not start.
    """
    # Unix socket paths end at 107 bytes, so Ray's directory has to have a short name.
    directory = str(temp_dir or Path(tempfile.gettempdir()) / "ray")
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=bool(os.environ.get("RLBRIDGE_ACTOR_LOGS")),
                _temp_dir=directory,
            )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == _STARTS:
                raise ResourceError(
                    f"Ray did not start in {_STARTS} tries: {error}", todo=f"its logs are in {directory}/session_latest/logs"
                ) from error
            time.sleep(2.0 * attempt)


def _join(address: str) -> None:
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=bool(os.environ.get("RLBRIDGE_ACTOR_LOGS")))
    except Exception as error:
        raise ResourceError(
            f"no Ray cluster answers at cluster.address={address}: {error}",
            todo="without cluster.address the run starts one of its own on this machine",
        ) from error
