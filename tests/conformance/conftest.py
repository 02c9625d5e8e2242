"""The reference backends by name, and the models that their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlbridge.plugins import registry


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry has the reference backends."""
    monkeypatch.setenv("RLBRIDGE_PLUGINS", "rlbridge_conformance.reference")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with an extra tensor of every awkward kind."""
    # Imported here, since the tests of the report do without torch.
    import torch
    from safetensors.torch import load_file, save_file

    from tests.conformance.reference_parties import VOCABULARY
    from tests.models import tiny_qwen3

    path = tiny_qwen3(tmp_path_factory.mktemp("tied"), tied=True, vocab_size=VOCABULARY)
    extras = {
        "extra.scalar": torch.tensor(3.5),
        "extra.empty": torch.zeros(0, 8),
        "extra.bytes": torch.arange(-60, 67, dtype=torch.int8),
        "extra.half": torch.randn(5, 7, 3).half(),
        "extra.large": torch.randn(600, 1000),
    }
    save_file(load_file(path / "model.safetensors") | extras, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads in groups of two; generation never meets an end-of-sequence token by chance."""
    from tests.conformance.reference_parties import VOCABULARY
    from tests.models import tiny_qwen3

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": None, "max_position_embeddings": 512}
    return tiny_qwen3(tmp_path_factory.mktemp("untied"), **sizes)
