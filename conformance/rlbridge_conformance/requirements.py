"""What a backend claims of the suite: documented one-line properties, one class a role.

By default a property says what the backend's declared capabilities say. A plugin that has to say more derives a class, and
names it in `Backend.requirements`, or in the ini option `rlbridge_requirements` of its own test configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlbridge.backend import Backend, Capability
from rlbridge.errors import ConfigError
from rlbridge.roles.transport import Side


class Requirements:
    """The claims of one backend.

    Attributes:
        known_failures: Why a check is known to fail, by its id without the level ("every_byte_arrives[2-1]", or without the
            brackets for all its cases). A known failure still is one in the verdict, but pytest passes; one that passes fails.
    """

    known_failures: ClassVar[Mapping[str, str]] = {}

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def declares(self, capability: Capability) -> bool:
        """Whether the backend's plugin declares it."""
        return capability in self.backend.capabilities

    def claims(self, name: str) -> bool:
        """The property `name`; one that does not exist is an error of whoever asks."""
        return bool(getattr(self, name))


class TrainerRequirements(Requirements):
    """What a trainer claims."""

    @property
    def multi_rank(self) -> bool:
        """It runs on more than one rank."""
        return self.declares(Capability.MULTI_RANK)

    @property
    def live_storage(self) -> bool:
        """Its parameters can be read in place: `sync.publish=barrier`."""
        return self.declares(Capability.LIVE_STORAGE)

    @property
    def sharded(self) -> bool:
        """It publishes what lies on each rank, without a gather."""
        return self.declares(Capability.SHARDED)

    @property
    def resumable(self) -> bool:
        """It goes on exactly from what `save_state` wrote."""
        return True


class GeneratorRequirements(Requirements):
    """What a generator claims."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Options that the suite adds to the user's own, for example a small memory share."""

    @property
    def pause_keep(self) -> bool:
        """Running requests can be held over an update, and go on with the weights of that moment."""
        return self.declares(Capability.PAUSE_KEEP)

    @property
    def pause_abort(self) -> bool:
        """Running requests can be ended with what they have."""
        return self.declares(Capability.PAUSE_ABORT)

    @property
    def several_engines(self) -> bool:
        """More than one engine fits on a machine."""
        return True

    @property
    def ranks_inside(self) -> bool:
        """Its ranks live in the generator's own process, where the suite can look into them and disturb them."""
        return True

    @property
    def ranks_are_actors(self) -> bool:
        """Every engine rank is itself a Ray actor."""
        return self.declares(Capability.RANKS_ARE_ACTORS)


class TransportRequirements(Requirements):
    """What a transport claims."""

    @property
    def one_sided(self) -> bool:
        """Only one end acts in a transfer."""
        return self.declares(Capability.ONE_SIDED)

    @property
    def cross_host(self) -> bool:
        """The two ends may be on different hosts."""
        return self.declares(Capability.CROSS_HOST)

    @property
    def rdma(self) -> bool:
        """It uses RDMA where the hosts have it."""
        return self.declares(Capability.RDMA)

    @property
    def abortable(self) -> bool:
        """A transfer that ran out of time is known not to write any more."""
        return self.declares(Capability.ABORTABLE)

    @property
    def live_storage(self) -> bool:
        """It reads a trainer's parameters in place: `sync.publish=barrier`."""
        return self.declares(Capability.LIVE_STORAGE)

    @property
    def descriptors_an_epoch(self) -> int:
        """Descriptors that an end keeps of each peer for each epoch that is over: 0, unless what it stands on keeps them."""
        return 0

    @property
    def plain_processes(self) -> bool:
        """It works between processes that are no Ray actors."""
        return not self.declares(Capability.NEEDS_RAY_ACTORS)

    def over_network(self, interface: str) -> Mapping[str, Any] | None:
        """Options that send the bytes over that interface though both ends are on one host; None if there are none."""
        return None

    def over_rdma(self) -> Mapping[str, Any] | None:
        """Options with which it fails rather than use another wire than RDMA; None if there are none."""
        return None

    def acting(self, side: Side) -> Mapping[str, Any] | None:
        """Options with which that end acts, and the other's memory is passive; None: there is no choice."""
        return None

    def registrations(self, transport: Any) -> int | None:
        """Blocks of memory that an open transport (of a rank's own process) has registered; None if it cannot be known."""
        return None


def check_claims(found: type[Requirements], checks: Sequence[str]) -> None:
    """A claim whose name is misspelt would change nothing, and a known failure of no check would never be missed.

    Raises:
        ConfigError: the class has a claim, or knows a failure, whose name does not exist; the nearest one is told.
    """
    ours = [cls for cls in found.__mro__ if cls.__module__ == __name__]
    claims = sorted({name for cls in ours for name in vars(cls) if not name.startswith("_")})
    for cls in found.__mro__[: found.__mro__.index(ours[0])]:
        for name in vars(cls):
            if not name.startswith("_") and name not in claims:
                raise ConfigError(f"{cls.__name__} claims {name!r}, and there is no such claim{_nearest(name, claims)}")
    if not isinstance(found.known_failures, Mapping):
        raise ConfigError(f"known_failures of {found.__name__} is no mapping", todo='write it as {"name_of_a_check": "why"}')
    for name in found.known_failures:
        if name.partition("[")[0] not in checks:
            raise ConfigError(
                f"known_failures of {found.__name__}: there is no check {name!r}{_nearest(name, checks)}",
                todo="rlbridge conform --list shows the names; here they stand without their level",
            )


def _nearest(name: str, known: Sequence[str]) -> str:
    bare = name.partition("[")[0].rpartition(".")[2].removeprefix("test_")
    near = difflib.get_close_matches(bare, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
