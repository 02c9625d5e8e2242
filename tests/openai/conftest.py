from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.environments import python_in
from tests.openai.server_process import ServerProcess, SglangProcess, VllmProcess, made
from tests.openai.stand_in import StandIn
from tests.openai.trainer import nursery


@pytest.fixture(autouse=True)
def close_generators() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


@pytest.fixture(scope="session", autouse=True)
def close_nursery() -> Iterator[None]:
    yield
    nursery.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as found:
        yield found


@pytest.fixture(scope="module", params=[VllmProcess, SglangProcess], ids=["vllm", "sglang"])
def kind(request: pytest.FixtureRequest) -> type[ServerProcess]:
    found: type[ServerProcess] = request.param
    return found


@pytest.fixture(scope="module")
def real(kind: type[ServerProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server, for all tests of a module."""
    with kind(python_in(kind.environment), tmp_path_factory.mktemp("server")) as found:
        yield found
