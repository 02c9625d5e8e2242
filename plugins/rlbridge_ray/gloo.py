"""A gloo group for Ray Direct Transport that leaves torch's default process group to the trainer.

Ray's own gloo group takes the default process group of each actor and sends by its ranks (Ray 2.60,
torch_gloo_collective_group). A trainer's ranks already have one among themselves, so Ray's would be refused, or reach the wrong
peer. This one is a process group of its own over a store of its own; Ray Direct Transport finds it by its name.
"""

from __future__ import annotations

import datetime
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.experimental.collective.collective import RemoteCommunicatorManager
from ray.experimental.collective.communicator import CommunicatorHandle
from ray.util import collective
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from rlbridge.errors import DeadlineError

_BACKEND = "RLBRIDGE_GLOO"


class PrivateGlooGroup(BaseGroup):  # type: ignore[misc]
    """Point-to-point gloo among the actors of one epoch.

    `group_name` is "id@host:port@seconds": Ray's constructor takes nothing else that could carry the store's address.
    """

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        identity, address, seconds = group_name.split("@")
        host, _, port = address.rpartition(":")
        timeout = datetime.timedelta(seconds=float(seconds))
        self._store = TCPStore(host, int(port), world_size, is_master=rank == 0, timeout=timeout)
        # Untyped: torch's stubs leave out what a process group does.
        self._group: Any = dist.ProcessGroupGloo(PrefixStore(identity, self._store), rank, world_size, timeout)

    @classmethod
    def backend(cls) -> str:
        """The name that it is registered under."""
        return _BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether this build of torch has gloo."""
        return bool(dist.is_gloo_available())

    def send(self, tensors: list[torch.Tensor], options: Any) -> None:
        """Send to `options.dst_rank`, in order."""
        self._group.send(tensors, options.dst_rank, 0).wait()

    def recv(self, tensors: list[torch.Tensor], options: Any) -> None:
        """Receive from `options.src_rank`, in order."""
        self._group.recv(tensors, options.src_rank, 0).wait()

    def destroy_group(self) -> None:
        """Let go of the connections."""
        del self._group, self._store

    def _unused(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this group carries weights from one rank to another and has no collectives")

    allreduce = barrier = reduce = allgather = broadcast = reducescatter = _unused


def create_group(actors: Sequence[Any], seconds: float) -> Callable[[], None]:
    """Join `actors` in one group that Ray Direct Transport finds as theirs for "gloo". Returns what dissolves it.

    Raises:
        DeadlineError: they have not all joined within `seconds`.
    """
    count = len(actors)
    try:
        address = ray.get(actors[0].__ray_call__.remote(_free_address), timeout=seconds)
        name = f"rlbridge-{uuid.uuid4().hex}@{address}@{seconds}"
        ray.get([a.__ray_call__.remote(_join, count, rank, name) for rank, a in enumerate(actors)], timeout=seconds)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineError(f"the {count} actors did not form a gloo group within {seconds:.0f} s", phase="connect") from error
    RemoteCommunicatorManager.get().add_remote_communicator(CommunicatorHandle(list(actors), name, "GLOO"))

    def dissolve() -> None:
        RemoteCommunicatorManager.get().remove_remote_communicator(name)
        # Not waited for: an actor that is gone leaves the group by being gone.
        for actor in actors:
            actor.__ray_call__.remote(_leave, name)

    return dissolve


def _free_address(_actor: Any) -> str:
    host = "127.0.0.1" if os.environ.get("GLOO_SOCKET_IFNAME") == "lo" else ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _join(_actor: Any, count: int, rank: int, name: str) -> None:
    from ray.util.collective.backend_registry import _global_registry, register_collective_backend

    if not _global_registry.is_registered(_BACKEND):
        register_collective_backend(_BACKEND, PrivateGlooGroup)
    collective.init_collective_group(count, rank, _BACKEND, group_name=name)


def _leave(_actor: Any, name: str) -> None:
    if collective.is_group_initialized(name):
        collective.destroy_collective_group(name)
