"""Imports point one way: `.importlinter` says which, and is held to it here."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

ROOT = Path(__file__).parents[1]


def test_imports_point_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    configure()
    kept = lint_imports(config_filename=".importlinter", cache_dir=None, no_logo=True)
    assert kept, capsys.readouterr().out
