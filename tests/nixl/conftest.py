"""The stage of the sync's tests."""

from __future__ import annotations

from tests.sync.conftest import make_stage, warm

__all__ = ["make_stage", "warm"]
