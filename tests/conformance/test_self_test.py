"""The score of the self-test, of outcomes that are made up here; real ones are in test_pairs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from rlbridge.plugins import registry
from rlbridge_conformance import self_test


@pytest.mark.parametrize(("at_last", "code", "score"), [(True, 0, "killed 2/2"), (False, 1, "killed 1/2")])
def test_what_survives_is_tried_once_more_by_itself(
    at_last: bool, code: int, score: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RLBRIDGE_PLUGINS", "")
    tried: list[tuple[list[str], int]] = []
    broken = [made_up(f"is-wrong-{n}") for n in range(2)]

    def run(chosen: Sequence[Any], jobs: int, console: Any, *, whole_level: bool) -> list[Any]:
        tried.append(([b.name for b in chosen], jobs))
        killed = [b is broken[0] or (at_last and len(tried) == 2) for b in chosen]
        return [SimpleNamespace(broken=b, killed=k) for b, k in zip(chosen, killed, strict=True)]

    monkeypatch.setattr(self_test, "catalogue", lambda: broken)
    monkeypatch.setattr(self_test, "_run", run)
    try:
        assert self_test.main(["-k", "is-wrong", "--jobs", "2"]) == code
    finally:
        registry.cache_clear()
    assert tried == [(["is-wrong-0", "is-wrong-1"], 2), (["is-wrong-1"], 1)]
    assert capsys.readouterr().out.splitlines()[-1] == score


def test_what_this_machine_cannot_run_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RLBRIDGE_PLUGINS", "")
    broken = [made_up("is-wrong-0"), made_up("is-wrong-1", "rdma")]
    monkeypatch.setattr(self_test, "catalogue", lambda: broken)
    monkeypatch.setattr(self_test, "lacks", lambda need: f"no {need} here")
    monkeypatch.setattr(self_test, "_run", lambda chosen, *_, **__: [SimpleNamespace(broken=b, killed=True) for b in chosen])
    try:
        assert self_test.main(["-k", "is-wrong"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert self_test.main(["-k", "is-wrong-1"]) == 3
    finally:
        registry.cache_clear()
    assert said[-1] == "killed 1/1, 1 not run"
    assert said[0].startswith("not run")
    assert "is-wrong-1" in said[0]
    assert said[0].endswith("contract.x: no rdma here")
    assert capsys.readouterr().out.splitlines()[-1] == "killed 0/0, 1 not run"


def made_up(name: str, *machine: str) -> Any:
    return SimpleNamespace(name=name, level="contract", role="transport", check="contract.x", machine=machine)
