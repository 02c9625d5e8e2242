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
    broken = [SimpleNamespace(name=f"is-wrong-{n}", level="contract", role="transport", check="contract.x") for n in range(2)]

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
