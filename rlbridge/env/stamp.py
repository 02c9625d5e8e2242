"""The stamp of an environment: written last, so a directory without one is unfinished."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

STAMP = "rlbridge.json"
"""The name of its file."""


class Stamp(msgspec.Struct, frozen=True):
    """What an environment was built from, and what is in it.

    Attributes:
        name: The environment's.
        key: As in the name of its directory.
        lock: The lock's sha256.
        python: Version of its interpreter.
        ray: Version of its Ray; empty: it has none.
        rlbridge: Version of its rlbridge.
        brought: The distributions that were copied from the driver's environment, and a fingerprint of each.
        built: When, in UTC.
    """

    name: str
    key: str
    lock: str
    python: str
    ray: str
    rlbridge: str
    brought: dict[str, str]
    built: str


def now() -> str:
    """The time, as a stamp has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_stamp(prefix: Path) -> Stamp | None:
    """The stamp of the environment in a directory; None: it has none, or one that another version of rlbridge wrote."""
    try:
        return msgspec.json.decode((prefix / STAMP).read_bytes(), type=Stamp)
    except (OSError, msgspec.MsgspecError):
        return None


def write_stamp(prefix: Path, stamp: Stamp) -> None:
    """From here on the environment counts as built."""
    draft = prefix / f"{STAMP}.draft"
    with draft.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(stamp), indent=2))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(prefix / STAMP)


def take_stamp(prefix: Path) -> None:
    """From here on the environment counts as unfinished."""
    (prefix / STAMP).unlink(missing_ok=True)
