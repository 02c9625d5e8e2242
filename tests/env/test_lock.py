"""A lock is made from what a plugin declares, and names no place on the machine that made it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlbridge.env import compile_lock
from rlbridge.env.lockfile import pins, published, to_install
from rlbridge.env.requirements import expanded
from rlbridge.errors import BuildError, PluginError
from tests.env.conftest import Declare
from tests.env.test_build import quiet

COMPILED = """\
--index-url https://example.org/simple
--find-links /somewhere/wheels

numpy==2.1.0 ; python_version < "3.13" \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via torch
ray[default]==2.56.0 \\
    --hash=sha256:cc
    # via -r requirements
torch==2.13.0+cpu \\
    --hash=sha256:dd
    # via -r requirements
# The following packages were excluded from the output:
# setuptools
"""


def test_a_lock_has_the_newest_that_fits_and_is_named_after_its_command(declare: Declare, links: Path, tmp_path: Path) -> None:
    environment = declare("made", requirements=["quartz"], overrides=["pebble<2"])
    path = compile_lock(environment, quiet)
    assert path == tmp_path / "plugins/acme_envs/made.lock"
    text = path.read_text()
    assert text.startswith("# Made by: rlbridge env lock made\n")
    assert pins(text) == {"quartz": "1.0", "pebble": "1.0"}
    assert "--hash=sha256:" in text
    for place in (links, tmp_path, Path.home(), Path(tempfile.gettempdir())):
        assert str(place) not in text


def test_versions_stay_unless_newer_ones_are_asked_for(declare: Declare) -> None:
    environment = declare("kept", "pebble==1.0\n", requirements=["pebble"])
    assert pins(compile_lock(environment, quiet).read_text()) == {"pebble": "1.0"}
    assert pins(compile_lock(environment, quiet, upgrade=True).read_text()) == {"pebble": "2.0"}


def test_a_lock_is_written_elsewhere_on_request(declare: Declare, tmp_path: Path) -> None:
    output = tmp_path / "there.lock"
    assert compile_lock(declare("made", requirements=["pebble"]), quiet, output) == output
    assert pins(output.read_text()) == {"pebble": "2.0"}


def test_rlbridge_stands_for_what_it_requires(declare: Declare) -> None:
    lines = expanded(declare("core", requirements=["rlbridge[rdt]", "quartz>=1"]))
    names = {Requirement(line).name for line in lines}
    assert {"ray", "torch", "msgspec", "nixl", "quartz"} <= names
    assert not {"rlbridge", "jinja2", "sphinx"} & names
    assert len(lines) == len(set(lines))


def test_what_is_no_requirement_is_named(declare: Declare) -> None:
    with pytest.raises(PluginError, match="a requirement of the environment 'odd' is none"):
        compile_lock(declare("odd", requirements=["what is this"]), quiet)


def test_requirements_that_cannot_be_had_together_leave_the_lock_as_it_is(declare: Declare, tmp_path: Path) -> None:
    environment = declare("torn", "pebble==1.0\n", requirements=["quartz", "pebble>2"])
    with pytest.raises(BuildError, match="locking torn: uv failed"):
        compile_lock(environment, quiet)
    assert (tmp_path / "plugins/acme_envs/torn.lock").read_text() == "pebble==1.0\n"


def test_what_was_found_here_is_left_out_and_so_are_torchs_hashes() -> None:
    assert published(COMPILED, "# mine\n") == (
        '# mine\nnumpy==2.1.0 ; python_version < "3.13" \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via torch\n'
        "ray[default]==2.56.0 \\\n    --hash=sha256:cc\n    # via -r requirements\n"
        "torch==2.13.0+cpu\n    # via -r requirements\n"
    )


def test_what_is_resolved_on_each_machine_keeps_no_version_of_this_one() -> None:
    text = published(COMPILED, "", ["Torch", "ray"])
    assert "torch==2.13.0\n" in text
    assert pins(text) == {"numpy": "2.1.0", "ray": "2.56.0", "torch": "2.13.0"}


def test_pins_are_read_by_normalised_name() -> None:
    assert pins("Foo_Bar.baz==1\n--no-index\n# a==2\nqux @ https://example.org/qux.whl\n") == {
        "foo-bar-baz": "1",
        "qux": "https://example.org/qux.whl",
    }


def test_what_is_installed_has_the_drivers_ray_and_keeps_its_hashes_where_it_is_the_same() -> None:
    same = to_install(COMPILED, [], "2.56.0")
    assert "sha256:cc" in same
    other = to_install(COMPILED, ["Torch==2.12.0", "sgl==1"], "2.60.0")
    assert "sha256:cc" not in other
    assert pins(other) == {"numpy": "2.1.0", "ray": "2.60.0", "torch": "2.12.0", "sgl": "1"}
