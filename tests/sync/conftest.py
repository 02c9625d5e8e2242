"""The stage of a test, and a parent process whose children start fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.sync.stage import Stage, stop_idle
from tests.sync.warm import warm_up


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Children start fast, and none is left at the end."""
    warm_up()
    yield
    stop_idle()


@pytest.fixture
def make_stage() -> Iterator[Callable[..., Stage]]:
    """`Stage`, and its end after the test."""
    made: list[Stage] = []

    def make(*args: Any, **kwargs: Any) -> Stage:
        made.append(Stage(*args, **kwargs))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
