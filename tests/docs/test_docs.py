"""The documentation builds without a warning, and what it shows works."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from rlbridge.backend import Capability
from rlbridge.cli.main import app
from rlbridge.config import RunConfig, load_config
from rlbridge.plugins import registry
from rlbridge.rl.prompts import read_prompts
from rlbridge.rl.rewards import resolve_reward, score_completions
from tests.docs.pages import DOCS, EXAMPLES, PAGES, ROOT, Block, blocks, prose

COMMANDS = [
    pytest.param(line.removeprefix("$ ").strip(), id=f"{block}:{line[2:42]}")
    for block in blocks("console")
    for line in block.text.splitlines()
    if line.strip().startswith("$ rlbridge")
]


def test_docs_build_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    built = subprocess.run([sys.executable, *command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    assert {p.stem for p in PAGES} <= {p.stem for p in (tmp_path / "html").glob("*.html")}
    reference = (tmp_path / "html/config.html").read_text()
    for key in ("model.path", "trainer.resources.gpus", "transport.operation", "transport.tensor_transport"):
        assert f'id="confval-{key}"' in reference


def test_config_reference_has_every_section_of_the_config() -> None:
    text = (DOCS / "config.md").read_text()
    sections = ["run", *(key for key, value in RunConfig.model_fields.items() if isinstance(value.annotation, type(BaseModel)))]
    assert re.findall(r"\{config-section\} (\w+)", text) == sections
    assert re.findall(r"\{config-backends\} (\w+)", text) == ["trainer", "generator", "transport"]


@pytest.mark.usefixtures("spool")
@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_of_the_docs_is_a_config(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    content.setdefault("model", {"path": "m"})
    content.setdefault("data", {"path": "p.jsonl"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_example_file_is_a_config(file: Path) -> None:
    load_config(file)


@pytest.mark.usefixtures("spool")
@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_docs_exists_with_its_options(line: str, tmp_path: Path) -> None:
    _, *tokens = shlex.split(line.partition(" > ")[0])
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    given: dict[str, Any] = bound.arguments
    file = given.get("config") or given.get("file")
    overrides: tuple[str, ...] = given.get("overrides", ())
    if given.get("resume") is not None:
        file = EXAMPLES / f"{given['resume'].name}.yaml"
    if file is not None:
        load_config(ROOT / file, overrides)
    assert command.__module__.startswith("rlbridge.cli.")


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:docs|plugins|conformance|tests|constraints|rlbridge)/[\w./-]+)`", prose(page))
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in linked if not (page.parent / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_python_that_a_page_gives_exist(page: Path) -> None:
    for name in re.findall(r"`(rlbridge(?:_conformance)?(?:\.\w+)+)`", prose(page)):
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize(
    "contract",
    ["transport:Transport", "trainer:Trainer", "generator:Generator", "source:WeightSource", "sink:WeightSink"],
)
def test_every_method_of_a_contract_is_described(contract: str) -> None:
    cls = pkgutil.resolve_name(f"rlbridge.roles.{contract}")
    text = (DOCS / "write_a_plugin.md").read_text()
    methods = [key for key in vars(cls) if not key.startswith("_") and callable(getattr(cls, key))]
    assert methods
    assert [method for method in methods if f"`{method}`" not in text] == []


def test_every_capability_is_described() -> None:
    described = re.findall(r"^\| `(\w+)`", (DOCS / "write_a_plugin.md").read_text(), re.MULTILINE)
    assert [c.value for c in Capability if c.value not in described] == []


def test_plugin_of_the_docs_carries_a_whole_sync(site: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "acme-spool/tests/test_spool.py", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_spool.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_rewards_of_the_docs_fit_the_prompts_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)
    prompts = read_prompts(EXAMPLES / "prompts.jsonl", "prompt", "answer")
    exact = resolve_reward("my_rewards:exact_match", registry())
    short = resolve_reward("my_rewards:short_and_right", registry())
    assert score_completions(exact, prompts, [" Lima\n", "Saturn"]).tolist() == [1.0, 0.0]
    assert score_completions(short, prompts, ["It is Lima.", "It is Jupiter."]).tolist() == [1.0, 0.5]
