"""What a run reads before anything is placed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlbridge.config import RunConfig, check_config
from rlbridge.errors import DataError, ModelError
from rlbridge.rl.start import load_task, make_model, prepare

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10)]


def as_jsonl(directory: Path) -> Path:
    path = directory / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def as_parquet(directory: Path) -> Path:
    path = directory / "p.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_dataset(directory: Path) -> Path:
    path = directory / "dataset"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_dataset])
def test_prompts_come_from_a_file_or_a_dataset_directory(
    config_of: Callable[..., RunConfig], tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    config = config_of(f"data.path={write(tmp_path)}", "reward.fn=exact_match")
    check_config(config)
    task = prepare(config, lambda line: None).task
    assert [(p.text, p.answer) for p in [*task.prompts, *task.held_out]] == [(r["prompt"], r["answer"]) for r in ROWS]
    assert len(task.held_out) == 4


def test_a_prompt_that_does_not_fit_the_model_is_named(
    config_of: Callable[..., RunConfig], tmp_path: Path, model: Path
) -> None:
    from transformers import AutoTokenizer

    short = tmp_path / "short"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(short)
    (short / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(DataError, match=r"prompts\.jsonl:1 has 4 tokens; with 3 more it is beyond the model's 6"):
        load_task(config_of(f"model.path={short}"))


def test_a_directory_that_is_no_model_is_not_overwritten_by_a_made_one(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match=r"no config\.json"):
        make_model(config_of(f"model.path={notes}", "model.make=arithmetic"), lambda line: None)
    assert (notes / "mine.txt").read_text() == "keep"
