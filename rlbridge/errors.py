"""One hierarchy of errors: what failed, where (role, rank, peer, version, phase, tensor), and what to do."""

from __future__ import annotations

import traceback

import msgspec

_WHERE_ORDER = ("role", "rank", "peer", "version", "phase", "tensor")


class RlbridgeError(Exception):
    """Base of every error that rlbridge raises on purpose.

    Args:
        what: One sentence, what failed.
        todo: What the reader can do about it.
        where: role, rank, peer, version, phase, tensor and the like, as far as they are known.

    Attributes:
        origin: Of an error that began as somebody else's, in another process: the traceback there. Python shows it as a note.
    """

    exit_code = 1
    origin: str = ""

    def __init__(self, what: str, *, todo: str = "", **where: object) -> None:
        self.what = what
        self.todo = todo
        self.where = {key: str(value) for key, value in where.items() if value is not None}
        super().__init__(str(self))

    def __str__(self) -> str:
        keys = [k for k in _WHERE_ORDER if k in self.where] + [k for k in self.where if k not in _WHERE_ORDER]
        place = f" [{', '.join(f'{k} {self.where[k]}' for k in keys)}]" if keys else ""
        return f"{self.what}{place}" + (f"\n  {self.todo}" if self.todo else "")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self).__name__, self.what, self.todo, self.where, self.origin))

    def at(self, **where: object) -> RlbridgeError:
        """This error with more of the place filled in; what was known already is kept."""
        self.where = {key: str(value) for key, value in where.items() if value is not None} | self.where
        self.args = (str(self),)
        return self

    def raised_by(self, origin: str) -> RlbridgeError:
        """This error with the traceback of the one that it stands for."""
        self.origin = origin
        if origin:
            self.add_note(f"it was raised by\n{origin}")
        return self


class ConfigError(RlbridgeError):
    """A configuration that cannot be run: unknown key, wrong type, an impossible combination."""

    exit_code = 2


class PluginError(RlbridgeError):
    """A plugin or a backend that is unknown, not installed, or broken."""

    exit_code = 2


class BuildError(RlbridgeError):
    """An environment could not be built, locked or removed."""


class ResourceError(RlbridgeError):
    """The cluster cannot give what the run asks for, or lost it."""


class DataError(RlbridgeError):
    """Prompts that cannot be used: missing file, bad line, empty dataset."""

    exit_code = 2


class RewardError(RlbridgeError):
    """A reward function that raised, or returned something that is not a finite number."""


class ModelError(RlbridgeError):
    """A model directory that cannot be loaded."""

    exit_code = 2


class CheckpointError(RlbridgeError):
    """A checkpoint that could not be written or read. The previous one is intact."""


class LayoutError(RlbridgeError):
    """Two descriptions of the weights do not fit: a tensor is missing, surplus, overlapping or of another shape or dtype."""


class TransportError(RlbridgeError):
    """The transport failed, or cannot be had on this machine."""


class SyncError(RlbridgeError):
    """A weight sync did not come to its commit. What the generator serves is whole, or it refuses to serve."""


class DeadlineError(SyncError):
    """Somebody did not answer in time."""


class DigestError(SyncError):
    """The bytes that arrived, or that were installed, are not the bytes that were published."""


class StaleVersionError(SyncError):
    """A version that is not newer than the one already published or served."""


class LeaseError(SyncError):
    """The memory of an earlier version is still being read: a subscriber has not acknowledged it."""


class QuarantineError(SyncError):
    """An arena that a timed-out transfer may still write into."""


class DirtyError(SyncError):
    """The generator holds a mixture of versions, and refuses to generate or score until a whole sync has succeeded."""


class PeerLostError(SyncError):
    """A process of the run is gone."""


class WireError(msgspec.Struct, frozen=True):
    """An error as it crosses from one environment to another."""

    kind: str
    what: str
    todo: str
    where: dict[str, str]
    origin: str = ""


def to_wire(error: BaseException) -> WireError:
    """Any exception as data; one that is not ours keeps its type's name in the text, and its traceback."""
    if isinstance(error, RlbridgeError):
        origin = error.origin or (_traceback(error.__cause__) if error.__cause__ else "")
        return WireError(type(error).__name__, error.what, error.todo, error.where, origin)
    return WireError("RlbridgeError", f"{type(error).__name__}: {error}", "", {}, _traceback(error))


def from_wire(error: WireError) -> RlbridgeError:
    """The error that `to_wire` was given, in this process."""
    return _rebuild(error.kind, error.what, error.todo, error.where, error.origin)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _rebuild(kind: str, what: str, todo: str, where: dict[str, str], origin: str) -> RlbridgeError:
    cls = globals().get(kind, RlbridgeError)
    if not (isinstance(cls, type) and issubclass(cls, RlbridgeError)):
        cls = RlbridgeError
    return cls(what, todo=todo, **where).raised_by(origin)
