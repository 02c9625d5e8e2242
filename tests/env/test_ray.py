"""Actors of a role run in its environment, and nowhere do the driver's packages come before the environment's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray

from rlbridge.cluster import groups, nodes
from rlbridge.cluster.ray_cluster import start_ray
from rlbridge.env import HERE, Place, build, compile_lock, place, remove
from rlbridge.env.location import ROOT_VARIABLE
from rlbridge.environment import Environment
from rlbridge.errors import BuildError, ResourceError
from rlbridge.plugins import registry
from rlbridge.roles.generator import GeneratorOptions
from rlbridge.roles.options import Resources
from tests.env.telling import Telling
from tests.env.test_build import quiet
from tests.run.conftest import RunIt, config_of, metrics, model, prompts, run_it

__all__ = ["config_of", "model", "prompts", "run_it"]  # fixtures

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NEEDED = ("msgspec", "numpy", "pluggy", "pydantic", "ray", "safetensors", "torch", "transformers", "xxhash")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(4, None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A built environment of what an actor of the backend `native` needs, in the driver's versions."""
    folder = tmp_path_factory.mktemp("declared")
    (folder / "acme_core").mkdir()
    (folder / "acme_core/__init__.py").touch()
    requirements = tuple(f"{name}=={version(name)}" for name in NEEDED)
    environment = Environment("acme-core", "For tests.", "acme_core:core.lock", requirements, modules=("torch",))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv(ROOT_VARIABLE, str(folder / "envs"))
        registry()._environments.append((environment, "acme_core"))
        try:
            compile_lock(environment, quiet)
            build(environment, quiet)
        except BuildError as error:
            if "is the network there?" in error.todo:
                pytest.skip(f"needs an index: {error.what}")
            raise
        yield place("generator", "native", "acme-core")
        registry()._environments.pop()
        remove("acme-core")  # pytest keeps the folders of the last few sessions


def told(where: Place, **variables: str) -> dict[str, Any]:
    options = GeneratorOptions(backend="native", variables=variables)
    group = groups._Group("trainer", Telling, options, 1, {"DEFAULT": "1"}, where)
    answer: dict[str, Any] = ray.get(group.parties[0].actor.tell.remote(), timeout=120)
    group.end()
    return answer


def test_an_actor_runs_in_the_environment_alone(ray_cluster: None, there: Place) -> None:
    answer = told(there, ACME="config")
    assert Path(answer["prefix"]) == there.prefix
    for name in ("numpy", "torch", "ray"):
        assert Path(answer["files"][name]).is_relative_to(str(there.prefix)), name
    drivers = Path(ray.__file__).parents[1]
    assert str(drivers) not in answer["path"]
    assert (answer["env"]["ACME"], answer["env"]["DEFAULT"], answer["env"]["VIRTUAL_ENV"]) == ("config", "1", str(there.prefix))
    assert answer["env"]["PATH"].startswith(f"{there.prefix}/bin{os.pathsep}")


def test_other_actors_of_the_session_run_in_the_drivers_own(ray_cluster: None) -> None:
    assert told(HERE)["prefix"] == sys.prefix


def test_a_node_that_lacks_the_environment_is_named(ray_cluster: None, there: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_own_node", lambda: "another")
    nodes.check_nodes("trainer", there, Resources())
    nodes.check_nodes("trainer", HERE, Resources())
    gone = Place("acme-core", Path("/nowhere/bin/python"), Path("/nowhere"))
    (node,) = ray.nodes()
    with pytest.raises(ResourceError, match=f"{node['NodeManagerHostname']}: there is no /nowhere/bin/python") as caught:
        nodes.check_nodes("trainer", gone, Resources())
    assert "rlbridge env build acme-core on that node" in caught.value.todo
    nodes.check_nodes("trainer", gone, Resources(gpus=1))  # no node that has one has been asked
    monkeypatch.setattr(ray, "__version__", "0.0")
    with pytest.raises(ResourceError, match=r"its Ray is .*, and the driver's 0\.0"):
        nodes.check_nodes("trainer", there, Resources())


def test_a_run_whose_roles_live_in_different_environments_learns_as_any(run_it: RunIt, there: Place, tmp_path: Path) -> None:
    summary = run_it(tmp_path / "both", "trainer.env=acme-core", "transport.backend=object_store")
    assert summary["steps"] == 2
    assert [line["step"] for line in metrics(tmp_path / "both")] == [1, 2]
