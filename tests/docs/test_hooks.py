"""docs/hooks.md describes every hook with its exact arguments, and no other."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlbridge import hookspecs
from rlbridge.plugins import Registry, Source
from rlbridge.rl.run import Run
from rlbridge.sync.report import SyncReport

DOCS = Path(__file__).parents[2] / "docs"
SPECS: dict[str, Any] = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("rlbridge_")}

_SECTION = re.compile(r"^### (rlbridge_\w+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def documented() -> dict[str, str]:
    """The section of each hook."""
    return dict(_SECTION.findall((DOCS / "hooks.md").read_text()))


def signature(name: str) -> str:
    return f"def {name}{inspect.signature(SPECS[name])}".replace("'", "")


def since(text: str) -> list[str]:
    return re.findall(r"Since (\d[\d.]*\d)\b", text)


def test_every_hook_is_documented_and_nothing_else_is() -> None:
    assert list(documented()) == list(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_hook_is_documented_with_its_exact_arguments(name: str) -> None:
    section = documented()[name]
    assert re.findall(r"^def .*$", section, re.MULTILINE) == [signature(name)]
    for argument in inspect.signature(SPECS[name]).parameters:
        assert argument == "run" or f"`{argument}" in section, f"{argument} is not explained"


@pytest.mark.parametrize("name", SPECS)
def test_hook_is_documented_with_the_version_that_brought_it(name: str) -> None:
    assert since(documented()[name]) == since(inspect.getdoc(SPECS[name]) or "") != []


def test_observer_of_the_docs_speaks_of_long_pauses_only(capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry([Source("slow_pauses", "", lambda: example("slow_pauses"))])
    assert not registry.broken
    run = Run("mine", Path("runs/mine"), None, steps=2)
    for version, pause in ((1, 0.01), (2, 0.75)):
        report = SyncReport(version, 1, 1.0, 10, {"pause": pause}, True, "nixl over cma")
        registry.manager.hook.rlbridge_weights_committed(run=run, report=report)
    assert capsys.readouterr().out == "mine: version 2 paused the slowest engine for 0.75 s\n"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
