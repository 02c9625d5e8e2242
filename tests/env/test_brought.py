"""What an environment gets from the driver's own is copied as its installer listed it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from rlbridge.env.brought import bring, fingerprint, source, wanted
from rlbridge.errors import BuildError


def install(site: Path, name: str, *, listed: bool = True, editable: str = "") -> None:
    """A distribution with one plugin, as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text("where = __file__\n")
    (site / "__pycache__").mkdir(exist_ok=True)
    (site / f"__pycache__/{name}.pyc").touch()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rlbridge]\n{name} = {name}\n")
    (info / "direct_url.json").write_text(f'{{"dir_info": {{"editable": {str(bool(editable)).lower()}}}, "url": "{editable}"}}')
    files = [f"../../../bin/{name},,", f"{name}.py,sha256=aa,1", f"__pycache__/{name}.pyc,,"]
    files += [f"{info.name}/{each},," for each in ("METADATA", "RECORD", "entry_points.txt", "direct_url.json")]
    (info / "RECORD").write_text("".join(f"{line}\n" for line in files) if listed else "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages of the driver's."""
    site = tmp_path / "here"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    return site


def test_a_distribution_is_copied_without_scripts_and_bytecode(here: Path, tmp_path: Path) -> None:
    install(here, "acme_one")
    there = tmp_path / "there"
    bring("acme_one", there)
    info = "acme_one-1.0.dist-info"
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()) == sorted(
        ["acme_one.py", *(f"{info}/{each}" for each in ("METADATA", "RECORD", "entry_points.txt", "direct_url.json"))]
    )
    assert ".." not in (there / info / "RECORD").read_text()
    (found,) = importlib.metadata.distributions(path=[str(there)])
    assert [entry.value for entry in found.entry_points] == ["acme_one"]


def test_what_was_copied_before_goes(here: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    install(there, "acme_two")
    (there / "acme_two.py").write_text("old\n")
    with (there / "acme_two-1.0.dist-info/RECORD").open("a") as record:
        record.write("dropped.py,,\n")
    (there / "dropped.py").touch()
    install(here, "acme_two")
    bring("acme_two", there)
    assert not (there / "dropped.py").exists()
    assert (there / "acme_two.py").read_text() == (here / "acme_two.py").read_text()


def test_plugins_are_brought_too_and_those_that_cannot_be_are_left(here: Path) -> None:
    install(here, "acme_three")
    install(here, "acme_four", listed=False)
    found = wanted("rlbridge")
    assert "acme_three" in found
    assert "rlbridge" in found
    assert "acme_four" not in found


def test_the_one_that_declares_an_environment_has_to_be_listed(here: Path) -> None:
    install(here, "acme_five", listed=False)
    with pytest.raises(BuildError, match="acme_five cannot be copied"):
        wanted("acme_five")
    with pytest.raises(BuildError, match="no_such_thing is not installed here"):
        wanted("no_such_thing")


def test_the_source_of_an_editable_install_tells_it_from_others(here: Path) -> None:
    install(here, "acme_six", editable="file:///one")
    first = fingerprint("acme_six")
    assert source("acme_six") == "file:///one"
    (here / "acme_six-1.0.dist-info/direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///two"}')
    assert fingerprint("acme_six") != first
