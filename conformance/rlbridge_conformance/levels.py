"""The levels of the suite, in their order, and the roles that it tests."""

from __future__ import annotations

from typing import Literal, get_args

Level = Literal["contract", "sync", "rdma", "faults", "speed"]
Role = Literal["trainer", "generator", "transport"]

LEVELS: tuple[Level, ...] = get_args(Level)
ROLES: tuple[Role, ...] = get_args(Role)
