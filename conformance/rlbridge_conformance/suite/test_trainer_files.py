"""Level contract, the trainer: what it saves, what it goes on from, and what it reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import CheckpointError, ModelError, RlbridgeError
from rlbridge_conformance.checks import check, expect, holds
from rlbridge_conformance.members import errors_of
from rlbridge_conformance.models import make_model
from rlbridge_conformance.oracle import read_checkpoint
from rlbridge_conformance.reference.config import read_config
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.trainer_stages import (
    most_ranks,
    moved,
    same,
    usual_stage,
)

_PROMPTS = [[5, 9, 17, 33, 2, 40, 11], [8, 23, 4, 31], [50, 2, 45]]


@check("contract", "trainer")
def test_a_saved_directory_loads(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    stage.sync()
    wanted = [c.token_ids for c in stage.generate(_PROMPTS)]
    path = stage.save()
    expect("config.json is saved", True, (path / "config.json").is_file())
    expect("the saved config says what the model's own says", read_config(stage.model), read_config(path))
    expect("greedy text of an engine that loads what is saved", wanted, stage.fresh_text(path, _PROMPTS))


@check("contract", "trainer")
def test_saving_leaves_nothing_else_behind(stages: Stages) -> None:
    stage = usual_stage(stages)
    before = {file.name for file in stage.directory.iterdir()}
    path = stage.save()
    after = {file.name for file in stage.directory.iterdir()}
    expect("files beside the saved directory", sorted(before), sorted(after - {path.name}))
    expect("temporary files in the saved directory", [], sorted(f.name for f in path.rglob("*") if _is_temporary(f.name)))


@check("contract", "trainer")
def test_saving_replaces_what_was_saved(stages: Stages) -> None:
    stage = usual_stage(stages)
    path = stage.save()
    first = read_checkpoint(path)
    stage.train(2)
    stage.on_trainers("save", str(path))
    second = stage.saved()
    expect("training moves the weights", True, moved(first, second))
    same("a directory that is saved to again holds the weights of now", second, read_checkpoint(path))


@check("contract", "trainer")
def test_saving_keeps_the_tokenizer(stages: Stages) -> None:
    stage = usual_stage(stages)
    model, path = stage.directory / "model-with-tokenizer", stage.directory / "saved-with-tokenizer"
    _write_tokenizer(make_model(model))
    with stage.lone_trainer(model) as trainer:
        trainer.ask("save", None, str(path))
    names = {file.name for file in path.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        holds(name in names, f"{name} is saved with the weights", name, sorted(names))
    expect("the saved tokenizer's vocabulary", _vocabulary(model), _vocabulary(path))


@check("contract", "trainer", needs=["trainer.resumable"])
def test_a_loaded_state_goes_on_exactly(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train(2)
    batches = [stage.batch(1), stage.batch(2)]
    state = stage.directory / "state-to-go-on"
    stage.on_trainers("save_state", str(state))
    start = stage.saved()
    wanted = []
    for batch in batches:
        stage.train_on(batch)
        wanted.append(stage.saved())
    expect("two steps move the weights", True, moved(start, wanted[-1]))
    stage.on_trainers("load_state", str(state))
    same("the weights are those whose state was saved", start, stage.saved())
    for step, (batch, weights) in enumerate(zip(batches, wanted, strict=True), start=1):
        stage.train_on(batch)
        same(f"step {step} after loading is what it was before", weights, stage.saved())


@check("contract", "trainer", needs=["trainer.resumable"])
def test_a_loaded_state_is_what_is_published(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    state = stage.directory / "state-to-publish"
    stage.on_trainers("save_state", str(state))
    saved = stage.saved()
    stage.train(2)
    stage.sync()
    stage.on_trainers("load_state", str(state))
    stage.scramble()
    stage.sync()
    stage.holds(saved)


@check("contract", "trainer", needs=["trainer.resumable"])
def test_what_is_no_state_is_refused(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    empty = stage.directory / "no-state"
    empty.mkdir()
    before = stage.saved()
    for what, path in {"no directory": empty / "none", "an empty directory": empty, "a saved model": stage.save()}.items():
        errors = [type(error).__name__ for error in _load_errors(stage, path)]
        expect(f"loading {what} as a state, on each rank", [CheckpointError.__name__] * len(stage.trainers), errors)
        same(f"the weights after {what} was refused", before, stage.saved())


@check("contract", "trainer", needs=["trainer.resumable"])
def test_a_damaged_state_is_refused(stages: Stages) -> None:
    stage = stages.fresh(ranks=most_ranks(stages), engines=0)
    stage.train()
    state = stage.directory / "state"
    stage.on_trainers("save_state", str(state))
    largest = max(sorted(file for file in state.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    errors = {type(error).__name__ for error in _load_errors(stage, state)}
    expect(f"loading a state whose {largest.name} lost its second half", {CheckpointError.__name__}, errors - {"NoneType"})


@check("contract", "trainer", needs=["trainer.resumable"])
def test_the_state_of_another_model_is_refused(stages: Stages) -> None:
    stage = usual_stage(stages)
    state = stage.directory / "state-of-another-model"
    with stage.lone_trainer(make_model(stage.directory / "another-model", "wide")) as trainer:
        trainer.ask("save_state", None, str(state))
    with stage.lone_trainer(stage.model) as trainer:
        error = errors_of(lambda: trainer.ask("load_state", None, str(state)))
    expect("loading the state of another model", CheckpointError.__name__, type(error).__name__)
    named = "" if error is None else error.where.get("tensor", "")
    holds(bool(named), "the error names the first tensor that differs", "a tensor", error)


@check("contract", "trainer")
@pytest.mark.parametrize("what", ["an empty directory", "no weights"])
def test_what_is_no_model_is_refused(stages: Stages, what: str) -> None:
    stage = usual_stage(stages)
    path = stage.directory / f"no-model-{what.replace(' ', '-')}"
    path.mkdir()
    if what == "no weights":
        shutil.copyfile(stage.model / "config.json", path / "config.json")
    error = errors_of(lambda: _set_up(stage, path))
    expect(f"setting up a trainer with {what}", ModelError.__name__, type(error).__name__)
    holds(str(path) in str(error), "the error names the directory", path, error)


@check("contract", "trainer")
def test_the_model_directory_is_only_read(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    stage.sync()
    stage.save()
    stage.on_trainers("save_state", str(stage.directory / "state-elsewhere"))
    untouched = make_model(stage.directory / "untouched", stage.scene.model)
    expect("files of the model directory", _digests(untouched), _digests(stage.model))


def _set_up(stage: Stage, path: Path) -> None:
    with stage.lone_trainer(path):
        pass


def _load_errors(stage: Stage, path: Path) -> list[RlbridgeError | None]:
    """What each rank raises when it loads a state."""
    futures = [trainer.begin("load_state", str(path)) for trainer in stage.trainers]
    pairs = zip(stage.trainers, futures, strict=True)
    return [errors_of(lambda t=t, f=f: t.answer(f, None, "load_state")) for t, f in pairs]  # type: ignore[misc]


def _is_temporary(name: str) -> bool:
    return name.startswith((".", "tmp", "~")) or name.endswith((".tmp", ".part", ".partial", ".lock", ".incomplete", "~"))


def _write_tokenizer(path: Path) -> None:
    """A tokenizer that splits at spaces, as the tokenizers library writes it."""
    model = {"type": "WordLevel", "vocab": {f"word{i}": i for i in range(64)}, "unk_token": "word0"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
        **empty,
    }
    (path / "tokenizer.json").write_text(json.dumps(whole))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _vocabulary(path: Path) -> Any:
    return json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
