"""The command line: exit codes, errors without tracebacks, and plugins of other distributions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlbridge
from rlbridge.cli import doctor_command
from rlbridge.cli import main as cli
from rlbridge.errors import RlbridgeError
from rlbridge.plugins import Registry
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.rdma.doctor import Finding

PLUGIN = """
from rlbridge import Backend, hookimpl

@hookimpl
def rlbridge_rewards():
    return [Backend("acme_reward", "acme_plugin:reward", "Always one.", requires={requires})]

def reward(prompt, completion):
    return 1.0
"""


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from rlbridge.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **env})


def install(site: Path, name: str, module: str, source: str) -> None:
    """A distribution with one plugin, as an installer leaves it."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[rlbridge]\n{name} = {module}\n")
    (info / "RECORD").touch()


def listed(site: Path) -> dict[str, list[dict[str, Any]]]:
    answer = command("plugins", "--json", PYTHONPATH=str(site))
    assert answer.returncode == 0, answer.stderr
    content: dict[str, list[dict[str, Any]]] = json.loads(answer.stdout)
    return content


def test_plugin_of_another_distribution_is_listed(tmp_path: Path) -> None:
    install(tmp_path, "acme", "acme_plugin", PLUGIN.format(requires=()))
    content = listed(tmp_path)
    assert {
        "role": "reward",
        "name": "acme_reward",
        "version": "1.2",
        "plugin": "acme",
        "distribution": "acme",
        "capabilities": [],
        "summary": "Always one.",
        "importable": True,
        "reason": "",
        "environments": [],
        "tested": [],
    } in content["backends"]


def test_backend_that_lacks_a_requirement_is_listed_with_the_reason(tmp_path: Path) -> None:
    install(tmp_path, "acme", "acme_plugin", PLUGIN.format(requires=("no_such_module",)))
    (row,) = [row for row in listed(tmp_path)["backends"] if row["name"] == "acme_reward"]
    assert (row["importable"], row["reason"]) == (False, "no module named 'no_such_module'")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def", "SyntaxError"),
        ("import sys; sys.exit('go away')", "SystemExit: go away"),
        ("from rlbridge import hookimpl\n@hookimpl\ndef rlbridge_trainers(extra): ...", "PluginValidationError"),
    ],
)
def test_broken_plugin_is_reported_and_the_rest_works(tmp_path: Path, source: str, reason: str) -> None:
    install(tmp_path, "acme", "acme_plugin", PLUGIN.format(requires=()))
    install(tmp_path, "wreck", "wreck_plugin", source)
    content = listed(tmp_path)
    assert "acme_reward" in [row["name"] for row in content["backends"]]
    (broken,) = [plugin for plugin in content["broken"] if plugin["name"] == "wreck"]
    assert (broken["distribution"], broken["version"]) == ("wreck", "1.2")
    assert broken["reason"].startswith(reason)


def test_broken_plugin_is_an_error_where_it_is_asked_to_be(tmp_path: Path) -> None:
    install(tmp_path, "wreck", "wreck_plugin", "1 / 0")
    answer = command("plugins", PYTHONPATH=str(tmp_path), RLBRIDGE_STRICT_PLUGINS="1")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: broken plugin wreck (wreck 1.2): ZeroDivisionError")
    assert "Traceback" not in answer.stderr


def test_table_shows_broken_plugins(tmp_path: Path) -> None:
    install(tmp_path, "wreck", "wreck_plugin", "1 / 0")
    answer = command("plugins", PYTHONPATH=str(tmp_path))
    assert "broken: wreck (wreck 1.2): ZeroDivisionError: division by zero" in answer.stdout


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == rlbridge.__version__


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("config", "env", "plugins", "run"))


def test_wrong_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "--jsonn"]) == 2
    assert "--jsonn" in capsys.readouterr().err


class CoffeeError(RlbridgeError):
    exit_code = 7


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (CoffeeError("no [coffee]", todo="make some", rank=1), 7, "error: no [coffee] [rank 1]\n  make some\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["ours", "interrupt"],
)
def test_error_is_printed_without_a_traceback(
    error: BaseException, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("rlbridge.cli.plugins_command.registry", fail)
    assert cli.main(["plugins"]) == code
    assert capsys.readouterr().err == shown


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbridge.cli.plugins_command.registry", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plugins"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("{model: {path: nowhere}, data: {path: nowhere.jsonl}, transport: {backend: auto}}\n")
    return path


def test_config_show_prints_every_key(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", str(file), "algorithm.steps=3", "sampling.stop=[a]"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["algorithm"]["steps"], shown["sampling"]["stop"], shown["seed"]) == (3, ["a"], 0)


def test_config_check_refuses_with_exit_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", str(file)]) == 2
    assert "model.path: there is no directory nowhere" in capsys.readouterr().err


def test_config_check_says_what_is_defaulted(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Registry, "missing", lambda *_: None)  # whatever is installed beside these tests
    for name in ("config.json", "model.safetensors", "prompts.jsonl"):
        (tmp_path / name).touch()
    assert cli.main(["config", "check", str(file), f"model.path={tmp_path}", f"data.path={tmp_path}/prompts.jsonl"]) == 0
    *notes, last = capsys.readouterr().out.splitlines()
    assert last == f"{file}: ok"
    assert any(note.startswith("transport.backend: auto") for note in notes)


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


def test_doctor_asks_what_it_is_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 2
    assert "rlbridge doctor --rdma" in capsys.readouterr().err


@pytest.mark.skipif(has_rdma_device(), reason="this machine has an RDMA device")
def test_doctor_says_that_there_is_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--rdma", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["rdma"] is False
    assert [(finding["about"], finding["verdict"]) for finding in said["findings"]] == [("device", "problem")]
    assert cli.main(["doctor", "--rdma"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("RDMA is not used on this host")


def test_doctor_tries_every_transport_with_rdma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The ports are made up, and the transport moves real bytes: by shared memory, which is not RDMA, and it says so."""
    healthy = [Finding("port mlx5_0:1", "ok", "active")]
    monkeypatch.setattr(doctor_command, "findings", lambda: healthy.copy())
    assert cli.main(["doctor", "--rdma", "--json"]) == 1
    (port, tried) = json.loads(capsys.readouterr().out)["findings"]
    assert (port["verdict"], tried["about"], tried["verdict"]) == ("ok", "transport nixl", "problem")
    assert "no bytes over RDMA: nixl cannot work here: transport.wire=rdma" in tried["said"]
    monkeypatch.setattr(doctor_command, "OPTIONS", {})
    assert cli.main(["doctor", "--rdma", "--json"]) == 0
    (_, tried) = json.loads(capsys.readouterr().out)["findings"]
    assert tried["said"].startswith("8388608 bytes over cma, the right ones")
