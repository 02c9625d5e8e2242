"""A framework that has changed what a plugin calls is told so by name, before it fails within."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from rlbridge.errors import PluginError
from rlbridge.seams import Seam, check_seams


class Engine:
    def step(self, data: object, loss: object) -> None: ...
    def step_with_default(self, data: object, loss: object, scale: float = 1.0) -> None: ...
    def step_with_one_more(self, data: object, loss: object, scale: float) -> None: ...
    def step_renamed(self, batch: object, loss: object) -> None: ...
    def step_swapped(self, loss: object, data: object) -> None: ...
    def step_by_keyword(self, data: object, *, loss: object) -> None: ...
    def step_with_anything(self, data: object, **others: Any) -> None: ...
    def step_with_none(self) -> None: ...


@pytest.fixture(autouse=True)
def framework(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("acme_framework")
    module.Engine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_framework", module)


def check(name: str, parameters: tuple[str, ...] | None = ("self", "data", "loss")) -> None:
    check_seams("pytest", "pytest>=8", [Seam(f"acme_framework:Engine.{name}", parameters)])


@pytest.mark.parametrize("name", ["step", "step_with_default", "step_by_keyword", "step_with_anything"])
def test_what_can_still_be_called_the_same_way_is_no_change(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", ["step_with_one_more", "step_renamed", "step_swapped", "step_with_none"])
def test_what_takes_other_parameters_is_named_with_both_signatures(name: str) -> None:
    with pytest.raises(PluginError) as caught:
        check(name)
    said = str(caught.value)
    assert f"pytest {pytest.__version__} is not what its plugin was written for" in said
    assert f"Engine.{name} takes (self" in said
    assert "and was called with (self, data, loss)" in said
    assert "pip install 'pytest>=8'" in said


def test_everything_that_is_gone_is_named_at_once() -> None:
    seams = [Seam("acme_framework:Engine.step"), Seam("acme_framework:Engine.gone"), Seam("acme_engines:Engine")]
    with pytest.raises(PluginError) as caught:
        check_seams("pytest", "pytest>=8", seams)
    assert "Engine.gone of acme_framework is gone" in str(caught.value)
    assert "Engine of acme_engines is gone" in str(caught.value)
    assert "Engine.step" not in str(caught.value)
