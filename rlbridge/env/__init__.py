"""Environments of roles: built once, in the user's cache, from the locks that plugins ship."""

from rlbridge.env.building import build
from rlbridge.env.checking import Checked, check
from rlbridge.env.location import directory, python_of, root
from rlbridge.env.locking import compile_lock
from rlbridge.env.placing import HERE, Place, absent, place, version_at
from rlbridge.env.removing import remove
from rlbridge.env.state import Found, State, found, state_of

__all__ = [
    "HERE",
    "Checked",
    "Found",
    "Place",
    "State",
    "absent",
    "build",
    "check",
    "compile_lock",
    "directory",
    "found",
    "place",
    "python_of",
    "remove",
    "root",
    "state_of",
    "version_at",
]
