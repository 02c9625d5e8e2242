"""The stage of a test, and a parent process whose children start fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.sync.stage import Stage
from tests.sync.warm import warm_up


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    warm_up()


@pytest.fixture
def make_stage() -> Iterator[Callable[..., Stage]]:
    """`Stage`, and the end of its processes after the test."""
    made: list[Stage] = []

    def make(*args: Any, **kwargs: Any) -> Stage:
        made.append(Stage(*args, **kwargs))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
