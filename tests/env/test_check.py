"""`rlbridge env check` finds what differs, and says the cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlbridge.env import build, check, driver
from rlbridge.env.location import python_of
from rlbridge.env.stamp import read_stamp, write_stamp
from tests.env.conftest import Declare
from tests.env.test_build import quiet

LOCK = "pebble==1.0\npluggy==1.6\nray==0.1\n"


@pytest.fixture(autouse=True)
def old_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has the Ray that the test's wheels have."""
    monkeypatch.setattr(driver, "ray_version", lambda: "0.1")


def test_an_environment_that_is_well_has_no_problems(declare: Declare) -> None:
    environment = declare("tiny", LOCK, modules=["pebble"])
    build(environment, quiet)
    assert check(environment).problems == ()


def test_what_is_not_built_is_a_problem(declare: Declare) -> None:
    checked = check(declare("tiny", LOCK))
    assert (checked.problems, checked.todo) == (("it is not built",), "rlbridge env build tiny")


def test_modules_that_cannot_be_imported_are_named(declare: Declare, tmp_path: Path) -> None:
    (tmp_path / "plugins/lent.py").touch()  # on PYTHONPATH, which lends an environment nothing
    environment = declare("tiny", LOCK, modules=["pebble", "boulder", "lent"])
    build(environment, quiet)
    assert check(environment).problems == (
        "boulder cannot be imported: ModuleNotFoundError: No module named 'boulder'",
        "lent cannot be imported: ModuleNotFoundError: No module named 'lent'",
    )


def test_a_module_that_ends_the_interpreter_is_a_problem(declare: Declare, tmp_path: Path) -> None:
    folder = tmp_path / "plugins/acme_envs/only_here"
    folder.mkdir()
    (folder / "abrupt.py").write_text("import os; os._exit(3)\n")
    environment = declare("tiny", LOCK, site="acme_envs:only_here", modules=["abrupt"])
    build(environment, quiet)
    (problem,) = check(environment).problems
    assert problem.startswith("importing rlbridge, abrupt ended its interpreter (3)")


def test_the_environments_variables_are_set(declare: Declare, tmp_path: Path) -> None:
    folder = tmp_path / "plugins/acme_envs/only_here"
    folder.mkdir()
    (folder / "asks.py").write_text("import os; os.environ['ACME_THREADS']\n")
    environment = declare("tiny", LOCK, site="acme_envs:only_here", modules=["asks"], variables={"ACME_THREADS": "1"})
    build(environment, quiet)
    assert check(environment).problems == ()


def test_versions_that_differ_from_the_drivers_are_named(declare: Declare) -> None:
    environment = declare("tiny", LOCK)
    prefix = build(environment, quiet)
    site = driver.site_packages(prefix)
    (site / "ray-0.1.dist-info").rename(site / "ray-0.2.dist-info")
    metadata = site / "ray-0.2.dist-info/METADATA"
    metadata.unlink()  # it is one file with that of uv's cache
    metadata.write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.2\n")
    stamp = read_stamp(prefix)
    assert stamp is not None
    write_stamp(prefix, type(stamp)(**{f: getattr(stamp, f) for f in stamp.__struct_fields__} | {"python": "3.8.1"}))
    checked = check(environment)
    minor = driver.minor(driver.python_version())
    assert checked.problems == (f"its Python is 3.8, and the driver's {minor}", "its Ray is 0.2, and the driver's 0.1")
    assert checked.todo == "rlbridge env remove tiny, then rlbridge env build tiny"


def test_an_interpreter_that_is_gone_is_a_problem(declare: Declare, tmp_path: Path) -> None:
    environment = declare("tiny", LOCK)
    python = python_of(build(environment, quiet))
    python.unlink()
    python.symlink_to(tmp_path / "gone")
    assert check(environment).problems == (f"its interpreter is gone: {python} -> {tmp_path / 'gone'}",)
