"""A config whose roles cannot be placed is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlbridge.config import RunConfig, check_config, incompatibilities, load_config
from rlbridge.env import Place, build, driver
from rlbridge.errors import ConfigError
from rlbridge.plugins import registry
from tests.env.conftest import Declare
from tests.env.test_build import quiet


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config with all its files."""
    for name in ("config.json", "model.safetensors", "prompts.jsonl"):
        (tmp_path / name).touch()
    path = tmp_path / "run.yaml"
    path.write_text(f"{{model: {{path: {tmp_path}}}, data: {{path: {tmp_path}/prompts.jsonl}}}}\n")
    return path


def refused(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    return str(caught.value)


def test_an_environment_that_is_unknown_or_not_built_is_refused(declare: Declare, file: Path) -> None:
    declare("acme-tiny", "pebble==1.0\n")
    said = refused(load_config(file, ["trainer.env=acme-tiny", "generator.env=acme-tyni"]))
    assert "trainer.backend: the environment 'acme-tiny' is not built" in said
    assert "rlbridge env build acme-tiny" in said
    assert "generator.backend: no environment is named 'acme-tyni'; did you mean 'acme-tiny'?" in said


def test_a_transport_that_the_environment_lacks_is_refused(
    declare: Declare, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "ray_version", lambda: "0.1")
    lock = "ray==0.1\n" + "".join(f"{name}==1.0\n" for name in ("torch", "transformers", "safetensors"))
    build(declare("acme-tiny", lock), quiet)
    config = load_config(file, ["trainer.env=acme-tiny", "transport.backend=nixl"])
    expected = "transport.backend 'nixl' cannot be used in the environment 'acme-tiny' of the trainer: it has no module 'nixl'"
    assert expected in incompatibilities(config, "nixl")
    assert expected not in incompatibilities(config, "object_store")


def test_a_version_that_the_backend_was_not_tested_with_is_refused_by_name(
    declare: Declare, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "ray_version", lambda: "0.1")
    lock = "ray==0.1\n" + "".join(f"{name}==1.0\n" for name in ("torch", "transformers", "safetensors"))
    build(declare("acme-tiny", lock), quiet)
    config = load_config(file, ["trainer.env=acme-tiny", "transport.backend=object_store"])
    tested = replace(registry().backend("trainer", "native"), tested=("transformers>=2", "absent>=1"))
    monkeypatch.setattr(registry(), "backend", lambda role, name: tested)
    said = refused(config)
    assert (
        "trainer.backend 'native' is tested with transformers>=2, and 1.0 is installed in the environment 'acme-tiny'" in said
    )
    assert "pip install 'transformers>=2'" in said
    assert "absent" not in said
    assert "generator.backend" not in said  # what is installed here is new enough


def test_where_a_role_runs_is_told_where_the_config_did_not_say(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbridge.config.check.place", lambda role, backend, env: Place(note=f"{role}: elsewhere"))
    notes = check_config(load_config(file, ["transport.backend=object_store"]))
    assert {"trainer: elsewhere", "generator: elsewhere"} <= set(notes)
