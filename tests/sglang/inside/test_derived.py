"""What SGLang says of copies that it makes of weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.model_runner_components import weight_updater

from rlbridge_sglang.rank_process import derived_copies

_GUARD = "_unsupported_derived_weight_cache_error"


def test_a_model_that_keeps_copies_of_its_weights_is_refused_by_sglang() -> None:
    runner = SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert derived_copies(runner) == ""
    runner.model[0]._derived_weight_cache_error = "copies are kept"
    assert derived_copies(runner) == "copies are kept"


@pytest.mark.parametrize("ask", [lambda: "no", lambda model=None: model, lambda model_runner=None: model_runner.model])
def test_every_version_of_that_guard_is_asked(monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    monkeypatch.setattr(weight_updater, _GUARD, ask)
    assert derived_copies(SimpleNamespace(model="no")) == "no"


def test_a_version_without_that_guard_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(weight_updater, _GUARD)
    assert derived_copies(SimpleNamespace(model="no")) == ""
