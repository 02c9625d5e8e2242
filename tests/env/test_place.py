"""Where a role runs: what the config names, or the driver's own environment, or the first of the backend's that is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlbridge import Backend, hookimpl
from rlbridge.env import HERE, Place, absent, build, driver, place
from rlbridge.env.location import python_of
from rlbridge.errors import PluginError
from rlbridge.plugins import Registry, Source, registry
from tests.env.conftest import Declare
from tests.env.test_build import quiet

LOCK = "pebble==1.0\nray==0.1\n"

Ask = Callable[..., Place]


@pytest.fixture
def ask(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`place` for a trainer `rock`, which needs the module pebble, as the wheels of these tests have it."""
    monkeypatch.setattr(driver, "ray_version", lambda: "0.1")

    def asked(env: str | None, *environments: str, requires: tuple[str, ...] = ("pebble",)) -> Place:
        plugin = ModuleType("rocks")
        rock = Backend("rock", "os:path", "Rocks.", extra="nixl", requires=requires, environments=environments)
        vars(plugin).update(rlbridge_trainers=hookimpl(lambda: [rock]))
        found = Registry([Source("acme_envs", "", lambda: __import__("acme_envs")), Source("rocks", "", lambda: plugin)])
        assert not found.broken
        monkeypatch.setattr("rlbridge.env.placing.registry", lambda: found)
        return place("trainer", "rock", env)

    return asked


def test_without_a_need_for_one_there_is_no_environment(declare: Declare, ask: Ask) -> None:
    build(declare("tiny", LOCK), quiet)
    assert ask(None, "tiny", requires=("json",)) == HERE


def test_the_first_that_is_built_is_taken_and_told(declare: Declare, ask: Ask) -> None:
    declare("best", LOCK)
    prefix = build(declare("next", LOCK), quiet)
    found = ask(None, "gone", "best", "next")
    assert (found.name, found.python, found.prefix) == ("next", python_of(prefix), prefix)
    assert found.note == "trainer rock: it runs in the environment next"


def test_none_that_is_built_is_an_error_with_both_ways(declare: Declare, ask: Ask) -> None:
    declare("tiny", LOCK)
    with pytest.raises(PluginError, match="the trainer 'rock' is not installed here: no module named 'pebble'") as caught:
        ask(None, "tiny")
    assert caught.value.todo == "pip install 'rlbridge[nixl]'\n  or rlbridge env build tiny"


def test_the_one_that_is_named_has_to_be_known(declare: Declare, ask: Ask) -> None:
    declare("tiny", LOCK)
    with pytest.raises(PluginError, match="no environment is named 'tinny'; did you mean 'tiny'"):
        ask("tinny")


def test_the_one_that_is_named_has_to_be_built(declare: Declare, ask: Ask) -> None:
    declare("tiny", LOCK)
    with pytest.raises(PluginError, match="the environment 'tiny' is not built") as caught:
        ask("tiny", requires=("json",))
    assert caught.value.todo == "rlbridge env build tiny"


def test_the_one_that_is_named_is_taken_though_the_driver_could(declare: Declare, ask: Ask) -> None:
    prefix = build(declare("tiny", LOCK), quiet)
    found = ask("tiny", requires=())
    assert (found.prefix, found.note) == (prefix, "")


def test_an_environment_without_what_the_backend_needs_is_refused(declare: Declare, ask: Ask) -> None:
    build(declare("tiny", LOCK), quiet)
    with pytest.raises(PluginError, match="cannot run in the environment 'tiny': it has no module 'quartz'"):
        ask("tiny", requires=("pebble", "quartz"))


def test_an_environment_without_ray_is_refused(declare: Declare, ask: Ask) -> None:
    build(declare("tiny", "pebble==1.0\n"), quiet)
    with pytest.raises(PluginError, match="it has no Ray"):
        ask("tiny")


def test_an_environment_that_somebody_has_changed_is_refused(declare: Declare, ask: Ask) -> None:
    site = driver.site_packages(build(declare("tiny", LOCK), quiet))
    metadata = site / "ray-0.1.dist-info/METADATA"
    metadata.unlink()
    metadata.write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.2\n")
    with pytest.raises(PluginError, match=r"has been changed: its Ray is 0\.2, and the driver's 0\.1"):
        ask("tiny")


def test_what_a_transport_needs_is_looked_for_in_the_environment(declare: Declare, ask: Ask) -> None:
    build(declare("tiny", LOCK), quiet)
    found = ask("tiny")
    assert absent(found, Backend("t", "os:path", "", requires=("pebble", "quartz.core"))) == "quartz.core"
    assert absent(HERE, Backend("t", "os:path", "", requires=("quartz",))) is None


def test_variables_let_nothing_of_the_drivers_packages_in(
    declare: Declare, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prefix = build(declare("tiny", LOCK, variables={"ACME": "1"}), quiet)
    packages, sources = tmp_path / "packages", tmp_path / "sources"
    (packages / "ray-7.dist-info").mkdir(parents=True)
    (packages / "ray-7.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 7\n")
    sources.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(sources)]))
    monkeypatch.setenv("PYTHONHOME", "elsewhere")
    monkeypatch.setenv("VIRTUAL_ENV", "elsewhere")
    variables = ask("tiny").variables
    assert variables["PATH"].startswith(f"{prefix}/bin{os.pathsep}")
    assert {name: variables[name] for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "ACME")} == {
        "PYTHONPATH": str(sources),
        "PYTHONHOME": "",
        "VIRTUAL_ENV": str(prefix),
        "ACME": "1",
    }


def test_rays_variables_of_an_environment_are_under_those_of_the_config() -> None:
    there = Place("tiny", Path("/with space/bin/python"), Path("/with space"), {"A": "place", "B": "place", "PATH": "driver's"})
    assert there.runtime_env({"A": "config"}, {"B": "default", "C": "default"}) == {
        "py_executable": "'/with space/bin/python'",
        "env_vars": {"A": "config", "B": "place", "C": "default", "PATH": "/with space/bin:${PATH}"},
    }
    assert HERE.runtime_env({"A": "config"}, {"C": "default"}) == {"env_vars": {"A": "config", "C": "default"}}


def test_the_suites_registry_knows_its_environments(declare: Declare) -> None:
    declare("tiny", LOCK)
    assert [e.name for e in registry().environments() if e.summary == "For tests."] == ["tiny"]
