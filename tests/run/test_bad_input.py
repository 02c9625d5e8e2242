"""What a user gets wrong is said before anything starts: what, where, what to do; and costs her nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlbridge.cli.main import main

CONFIG = {"sampling": {"max_tokens": 3}, "algorithm": {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4}}


@pytest.fixture
def config(model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that would run, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(CONFIG | {"model": {"path": str(model)}, "data": {"path": str(prompts), "held_out": 4}}))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `rlbridge run` says when it refuses; no run directory may be left by it."""
    assert main(["run", *arguments]) not in (0, None)
    said = capsys.readouterr().err
    assert said.startswith("error:")
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.wrokers=2"], "did you mean 'workers'"),
        (["algorithm.steps=many"], "algorithm.steps"),
        (["model.path=/nowhere"], "there is no directory /nowhere"),
        (["data.path=/nowhere.jsonl"], "there is no /nowhere.jsonl"),
        (["generator.backend=vlm"], "'vlm'"),
        (["transport.backend=nixll"], "nixl"),
        (["transport.wire=rdma"], "no RDMA device"),
        (["transport.require=rdma"], "no RDMA device"),
        (["transport.require=rdma", "transport.wire=tcp"], "require is rdma, and wire is tcp"),
        (["transport.backend=object_store", "transport.require=rdma"], "does not use RDMA"),
        (["transport.backend=rdt", "transport.tensor_transport=gloo", "transport.require=rdma"], "no RDMA device"),
        (["transport.backend=rdt", "transport.tensor_transport=nccl"], "needs a GPU"),
        (["transport.backend=object_store", "sync.publish=barrier"], "cannot read a trainer's parameters in place"),
        (["reward.fn=nowhere:reward"], "nowhere"),
        (["reward.fn=exact_mach"], "exact_match"),
        (["trainer.workers=3"], "cannot share evenly"),
        (["data.prompt_key=question"], "question"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_a_bad_setting_is_refused_in_words(
    config: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    assert expected in refused(capsys, str(config), *overrides)
    assert not (config.parent / "runs").exists()


def test_a_model_without_weights_is_refused(config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = config.parent / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    assert "has no weights" in refused(capsys, str(config), f"model.path={bare}")


def test_a_model_that_is_no_causal_language_model_is_refused(
    config: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model, config.parent / "other")
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(described | {"architectures": ["Qwen3ForTokenClassification"]}))
    said = refused(capsys, str(config), f"model.path={other}")
    assert "holds a Qwen3ForTokenClassification, which is no causal language model" in said
    assert "for the type 'qwen3': Qwen3ForCausalLM" in said
    (other / "config.json").write_text("[]")
    assert "config.json cannot be read" in refused(capsys, str(config), f"model.path={other}")


def test_a_bad_line_of_prompts_is_shown_with_its_number(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = config.parent / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", answer: 4}\n')
    said = refused(capsys, str(config), f"data.path={bad}")
    assert "bad.jsonl, line 2]" in said
    assert '{"prompt": "2+2=", answer: 4}' in said


def test_no_prompts_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = config.parent / "empty.jsonl"
    empty.write_text("\n")
    assert "empty.jsonl" in refused(capsys, str(config), f"data.path={empty}")


def test_a_run_directory_that_exists_is_not_touched(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = config.parent / "runs" / "old" / "summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    assert "--resume" in refused(capsys, str(config), "name=old")
    assert [p.name for p in kept.parent.iterdir()] == ["summary.json"]


def test_resuming_what_is_no_run_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run" in refused(capsys, "--resume", str(config.parent))
