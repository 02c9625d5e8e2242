"""Real faults for the suite: links that break, memory that is full, and what a machine must have for them."""

from __future__ import annotations

from rlbridge.errors import RlbridgeError


class SuiteError(RlbridgeError):
    """The suite could not do what it meant to do: no verdict about a backend."""
