"""The example of docs/environments.md is a plugin, and the page describes every field and command."""

from __future__ import annotations

import dataclasses
import re

from rlbridge import Environment
from rlbridge.cli.env_command import app
from rlbridge.plugins import Registry, Source
from tests.docs.test_hooks import DOCS, example

PAGE = (DOCS / "environments.md").read_text()


def test_the_example_declares_an_environment_and_a_backend_for_it() -> None:
    registry = Registry([Source("acme", "acme-engine", lambda: example("acme_engine"))])
    assert not registry.broken
    assert registry.environment("acme-cpu").distribution == "acme-engine"
    assert registry.backend("generator", "acme").environments == ("acme-cpu",)


def test_every_field_that_a_plugin_may_give_is_described() -> None:
    described = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert described == [
        field.name for field in dataclasses.fields(Environment) if field.name not in ("name", "summary", "distribution")
    ]


def test_every_command_is_shown() -> None:
    commands = [name for name in app if not name.startswith("-")]
    assert sorted(commands) == sorted({*re.findall(r"^\$ rlbridge env (\w+)", PAGE, re.MULTILINE)})
