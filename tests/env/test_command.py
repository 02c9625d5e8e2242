"""`rlbridge env` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlbridge.cli import main as cli
from rlbridge.env import build
from rlbridge.env.location import directories, root
from tests.env.conftest import Declare
from tests.env.test_build import TINY, quiet

Said = pytest.CaptureFixture[str]


def listed(capsys: Said) -> dict[str, dict[str, object]]:
    """What `rlbridge env list --json` says of the environments of the test."""
    assert cli.main(["env", "list", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out) if row["name"].startswith("acme")}


def test_build_says_what_it_does_and_where_it_is(declare: Declare, capsys: Said) -> None:
    declare("acme-tiny", TINY)
    assert cli.main(["env", "build", "acme-tiny"]) == 0
    said = capsys.readouterr()
    ((_, path),) = directories()
    assert said.out.startswith("acme-tiny is built, ")
    assert str(path) in said.out
    assert "installing acme-tiny\n" in said.err
    assert "+ pebble" not in said.err


def test_list_shows_the_state_of_each(declare: Declare, capsys: Said) -> None:
    build(declare("acme-tiny", "pebble==2.0\n"), quiet)
    declare("acme-tiny", TINY)
    declare("acme-bare")
    prefix = build(declare("acme-more", TINY), quiet)
    (root() / "acme-gone-0123456789ab").mkdir()
    rows = listed(capsys)
    assert {name: row["state"] for name, row in rows.items()} == {
        "acme-bare": "no lock",
        "acme-gone": "unfinished",
        "acme-more": "built",
        "acme-tiny": "outdated",
    }
    assert rows["acme-more"]["path"] == str(prefix)
    assert rows["acme-more"]["summary"] == "For tests."
    size = rows["acme-more"]["bytes"]
    assert isinstance(size, int)
    assert size > 10_000


def test_list_shows_what_an_environment_is_for(declare: Declare, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    declare("acme-tiny", TINY)
    assert listed(capsys)["acme-tiny"]["backends"] == ["reward acme"]
    assert cli.main(["env", "list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("acme-tiny")]
    assert line.split() == ["acme-tiny", "not", "built", "reward", "acme", "For", "tests."]


def test_plugins_shows_which_environment_has_what_is_missing(
    declare: Declare, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    environment = declare("acme-tiny", TINY)
    assert cli.main(["plugins"]) == 0
    assert "the environment acme-tiny has it: not built, rlbridge env build acme-tiny" in capsys.readouterr().out
    build(environment, quiet)
    assert cli.main(["plugins"]) == 0
    assert "the environment acme-tiny has it: built" in capsys.readouterr().out


def test_check_says_what_is_wrong_by_its_exit_code_too(declare: Declare, capsys: Said) -> None:
    declare("acme-tiny", TINY + "pluggy==1.6\n", modules=["pebble"])
    assert cli.main(["env", "check", "acme-tiny"]) == 1
    assert capsys.readouterr().out == "acme-tiny: it is not built\nrlbridge env build acme-tiny\n"
    assert cli.main(["env", "build", "acme-tiny"]) == 0
    capsys.readouterr()
    assert cli.main(["env", "check", "acme-tiny"]) == 0
    assert capsys.readouterr().out == "acme-tiny: ok\n"


def test_remove_takes_what_is_outdated_too(declare: Declare, capsys: Said) -> None:
    first = build(declare("acme-tiny", "pebble==2.0\n"), quiet)
    second = build(declare("acme-tiny", TINY), quiet)
    other = build(declare("acme-more", TINY), quiet)
    assert cli.main(["env", "remove", "acme-tiny"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"removed {path}" for path in (first, second))
    assert [path for _, path in directories()] == [other]
    assert cli.main(["env", "remove", "--all"]) == 0
    assert not list(directories())


def test_remove_of_what_no_plugin_declares_any_more(declare: Declare) -> None:
    declare("acme-tiny", TINY)
    (root() / "acme-gone-0123456789ab").mkdir(parents=True)
    assert cli.main(["env", "remove", "acme-gone"]) == 0
    assert not list(directories())


@pytest.mark.parametrize("command", ["build", "check", "remove", "lock"])
def test_an_unknown_name_is_refused_with_the_nearest(declare: Declare, capsys: Said, command: str) -> None:
    declare("acme-tiny", TINY)
    assert cli.main(["env", command, "acme-tyni"]) == 2
    assert "no environment is named 'acme-tyni'; did you mean 'acme-tiny'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["acme-tiny", "--all"]])
def test_remove_wants_a_name_or_all(declare: Declare, capsys: Said, arguments: list[str]) -> None:
    declare("acme-tiny", TINY)
    assert cli.main(["env", "remove", *arguments]) == 2
    assert "which environment is to be removed?" in capsys.readouterr().err


def test_lock_writes_the_plugins_lock(declare: Declare, capsys: Said, tmp_path: Path) -> None:
    declare("acme-new", requirements=["pebble<2"])
    assert cli.main(["env", "lock", "acme-new"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'plugins/acme_envs/acme-new.lock'}; its pins: 1\n"
