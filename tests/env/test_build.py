"""An environment is built once, from its lock, and counts as built when it is, and not before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlbridge
from rlbridge.env import State, build, building, driver, remove, state_of
from rlbridge.env.location import directories, directory, python_of
from rlbridge.env.stamp import read_stamp
from rlbridge.errors import BuildError, PluginError
from tests.env.conftest import Declare

TINY = "pebble==1.0\n"


def quiet(phase: str, line: str) -> None:
    """Tells nobody."""


def inside(prefix: Path, code: str, **variables: str) -> str:
    """What code prints in an environment, started as a stranger would."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([str(python_of(prefix)), "-c", code], capture_output=True, text=True, cwd="/", env=kept | variables)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def start(name: str) -> subprocess.Popen[str]:
    """`rlbridge env build`, in another process."""
    command = [sys.executable, "-m", "rlbridge", "env", "build", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(path: Path, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"there is no {path}"
        time.sleep(0.02)


def test_an_environment_has_what_its_lock_lists_and_the_drivers_rlbridge(declare: Declare) -> None:
    environment = declare("tiny", TINY + "pluggy==1.6\n")
    assert state_of(environment) is State.NOT_BUILT
    prefix = build(environment, quiet)
    assert state_of(environment) is State.BUILT
    answer = inside(prefix, "import pebble, rlbridge, sys; print(pebble.version, rlbridge.__version__, sys.version.split()[0])")
    assert answer.split() == ["1.0", rlbridge.__version__, driver.python_version()]
    points = "import importlib.metadata as m; print(sorted(p.value for p in m.entry_points(group='vllm.general_plugins')))"
    assert inside(prefix, points) == "['rlbridge_vllm.registration:register']"
    stamp = read_stamp(prefix)
    assert stamp is not None
    assert (stamp.name, stamp.python, stamp.rlbridge, stamp.ray) == ("tiny", driver.python_version(), rlbridge.__version__, "")


def test_modules_are_compiled(declare: Declare) -> None:
    site = driver.site_packages(build(declare("tiny", TINY), quiet))
    assert list(site.glob("__pycache__/pebble.*.pyc"))


def test_what_is_built_is_not_built_again(declare: Declare) -> None:
    environment = declare("tiny", TINY)
    prefix = build(environment, quiet)
    stamp, told = read_stamp(prefix), []
    assert build(environment, lambda phase, line: told.append(phase)) == prefix
    assert (read_stamp(prefix), told) == (stamp, [])


def test_what_is_built_may_lie_where_only_others_may_write(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = declare("tiny", TINY)
    prefix = build(environment, quiet)

    def denied(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(building, "turn", denied)
    assert build(environment, quiet) == prefix
    with pytest.raises(BuildError, match="Permission denied") as caught:
        build(declare("tiny", "pebble==2.0\n"), quiet)
    assert "RLBRIDGE_ENVS" in caught.value.todo


def test_nothing_is_installed_that_the_lock_does_not_list(declare: Declare) -> None:
    prefix = build(declare("narrow", "quartz==1.0\n"), quiet)
    assert not {"pebble"} & driver.versions(driver.site_packages(prefix)).keys()


def test_a_requirement_without_dependencies_takes_the_locks_place(declare: Declare) -> None:
    prefix = build(declare("grits", "quartz==1.0\npebble==1.0\n", no_deps=["grit==1.0", "pebble==2.0"]), quiet)
    there = driver.versions(driver.site_packages(prefix))
    assert (there["grit"], there["pebble"], there["quartz"]) == ("1.0", "2.0", "1.0")


def test_what_depends_on_the_machine_is_resolved_on_it(declare: Declare) -> None:
    prefix = build(declare("wide", "quartz==1.0\n", resolved=["Quartz"]), quiet)
    assert driver.versions(driver.site_packages(prefix))["pebble"] in ("1.0", "2.0")


def test_what_is_resolved_has_to_be_in_the_lock(declare: Declare) -> None:
    with pytest.raises(PluginError, match="the lock of the environment 'wide' has no quartz") as caught:
        build(declare("wide", "pebble==1.0\n", resolved=["quartz"]), quiet)
    assert "rlbridge env lock wide" in caught.value.todo


def test_an_environment_for_another_python_is_not_built(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = declare("tiny", TINY, python="3.11")
    monkeypatch.setattr(driver, "python_version", lambda: "3.12.4")
    with pytest.raises(PluginError, match=r"'tiny' is for Python 3\.11 alone, and this is 3\.12") as caught:
        build(environment, quiet)
    assert "install rlbridge in a Python 3.11" in caught.value.todo
    monkeypatch.setattr(driver, "python_version", lambda: "3.11.9")
    building._check_python(environment)


def test_ray_is_the_drivers_whatever_the_lock_says(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ray_version", lambda: "0.2")
    prefix = build(declare("rays", "ray==0.1\npebble==1.0\n"), quiet)
    stamp = read_stamp(prefix)
    assert stamp is not None
    assert stamp.ray == driver.versions(driver.site_packages(prefix))["ray"] == "0.2"


def test_another_lock_is_another_environment_and_the_first_is_outdated(declare: Declare) -> None:
    first = build(declare("tiny", TINY), quiet)
    changed = declare("tiny", "pebble==2.0\n")
    assert directory(changed) != first
    assert state_of(changed) is State.OUTDATED
    second = build(changed, quiet)
    assert {path for _, path in directories()} == {first, second}
    assert sorted(remove("tiny")) == sorted([first, second])
    assert state_of(changed) is State.NOT_BUILT


@pytest.mark.parametrize("part", ["ray_version", "rlbridge_version", "python_version"])
def test_another_driver_needs_another_environment(declare: Declare, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    environment = declare("tiny", TINY)
    first = directory(environment)
    monkeypatch.setattr(driver, part, lambda: "9.9.9")
    assert directory(environment) != first


def test_another_rlbridge_of_the_same_version_is_copied_anew(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = declare("tiny", TINY)
    prefix = build(environment, quiet)
    for module in (building, sys.modules["rlbridge.env.state"]):
        monkeypatch.setattr(module, "wanted", lambda distribution: {"rlbridge": "another"})
    assert state_of(environment) is State.OUTDATED
    told: list[str] = []
    assert build(environment, lambda phase, line: told.append(phase)) == prefix
    assert told == ["copying rlbridge from here"]
    assert state_of(environment) is State.BUILT


def test_a_folder_of_modules_is_on_the_path_with_its_own_pth_files(declare: Declare, tmp_path: Path) -> None:
    folder = tmp_path / "plugins/acme_envs/only_here"
    folder.mkdir()
    (folder / "stand_in.py").write_text("stands = 'in'\n")
    (folder / "own.pth").write_text("import os; os.environ['OWN_PTH'] = 'read'\n")
    prefix = build(declare("sited", TINY, site="acme_envs:only_here"), quiet)
    assert inside(prefix, "import os, stand_in; print(stand_in.stands, os.environ['OWN_PTH'])") == "in read"


def test_what_the_drivers_shell_sets_does_not_reach_uv_or_the_environment(
    declare: Declare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONHOME", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX", "UV_PYTHON"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    prefix = build(declare("tiny", TINY), quiet)
    assert (driver.site_packages(prefix) / "pebble.py").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_pips_find_links_count_where_uvs_are_not_set(declare: Declare, monkeypatch: pytest.MonkeyPatch, links: Path) -> None:
    monkeypatch.delenv("UV_FIND_LINKS")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{links} {links}")
    build(declare("tiny", TINY), quiet)


def test_a_lock_that_cannot_be_satisfied_says_so_and_leaves_nothing_built(declare: Declare) -> None:
    environment = declare("rare", "pebble==9.0\n")
    with pytest.raises(BuildError, match=r"installing rare: uv failed(?s:.*)pebble==9\.0") as caught:
        build(environment, quiet)
    assert "UV_INDEX" in caught.value.todo
    assert state_of(environment) is State.UNFINISHED


def test_no_network_says_so(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(BuildError) as caught:
        build(declare("far", "boulder==1.0\n"), quiet)
    assert "is the network there?" in caught.value.todo


def test_a_full_disk_says_so(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(building, "_bring", full)
    environment = declare("tiny", TINY)
    with pytest.raises(BuildError, match="No space left on device") as caught:
        build(environment, quiet)
    assert "free space" in caught.value.todo
    assert state_of(environment) is State.UNFINISHED


def test_no_uv_says_how_to_get_it(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(PluginError, match="made with uv, and there is none") as caught:
        build(declare("tiny", TINY), quiet)
    assert "pip install" in caught.value.todo


def test_rlbridge_is_never_fetched(declare: Declare) -> None:
    with pytest.raises(PluginError, match="names rlbridge, which is copied from here"):
        build(declare("wrong", "rlbridge==0.0.1\n"), quiet)


def test_an_environment_without_a_lock_says_who_makes_it(declare: Declare) -> None:
    environment = declare("bare")
    assert state_of(environment) is State.NO_LOCK
    with pytest.raises(PluginError, match="has no lock") as caught:
        build(environment, quiet)
    assert "rlbridge env lock bare" in caught.value.todo


def test_two_builds_at_once_are_one(declare: Declare, tmp_path: Path) -> None:
    environment = declare("walled", "brick==1.0\n")
    first = start("walled")
    until(tmp_path / "begun")
    assert state_of(environment) is State.UNFINISHED
    second = start("walled")
    assert second.stdout is not None
    assert "waiting: another process is at work on walled" in second.stdout.readline()
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert (tmp_path / "begun").read_text() == "begun\n"
    assert state_of(environment) is State.BUILT


def test_what_is_being_built_is_not_removed(declare: Declare, tmp_path: Path) -> None:
    environment = declare("walled", "brick==1.0\n")
    building = start("walled")
    until(tmp_path / "begun")
    with pytest.raises(BuildError, match="is being built by another process"):
        remove("walled")
    (tmp_path / "go").touch()
    building.communicate(timeout=60)
    assert state_of(environment) is State.BUILT


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_ended_counts_for_nothing_and_the_next_goes_on(
    declare: Declare, tmp_path: Path, number: signal.Signals
) -> None:
    environment = declare("walled", "pebble==1.0\nbrick==1.0\n")
    process = start("walled")
    until(tmp_path / "begun")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert state_of(environment) is State.UNFINISHED
    (tmp_path / "go").touch()  # also for a uv that outlived the build: its turn ends with it
    prefix = build(environment, quiet)
    assert state_of(environment) is State.BUILT
    assert inside(prefix, "import brick, pebble; print(brick.version, pebble.version)") == "1.0 1.0"
