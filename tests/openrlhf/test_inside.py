"""Runs the tests that need OpenRLHF, in its environment where that is built: each module in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.environments import run_inside

MODULES = sorted(Path(__file__).with_name("inside").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_openrlhf(module: Path) -> None:
    run_inside("openrlhf", module)
