"""The installed verl is what the plugin was written for, and another one is told so by name."""

from __future__ import annotations

from typing import Any

import pytest
from verl.workers.engine import BaseEngine

from rlbridge.errors import PluginError
from rlbridge_verl.seams import check_platform, check_trainer


def test_the_installed_verl_has_all_that_is_called() -> None:
    check_platform()
    check_trainer()


def test_a_changed_function_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_batch(self: Any, data: Any, loss_function: Any, optimizer: Any) -> None: ...

    monkeypatch.setattr(BaseEngine, "train_batch", train_batch)
    monkeypatch.delattr(BaseEngine, "get_per_tensor_param")
    with pytest.raises(PluginError, match=r"verl 0\.9\.\d+ is not what its plugin was written for") as caught:
        check_trainer()
    assert "BaseEngine.train_batch takes (self" in str(caught.value)
    assert "BaseEngine.get_per_tensor_param of verl.workers.engine is gone" in str(caught.value)
    assert "pip install 'verl>=0.9,<0.10'" in str(caught.value)
