"""Prompts: read from a file or a dataset directory, cut into deterministic batches, turned into tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlbridge.errors import DataError

Messages = list[dict[str, Any]]
"""A chat: {"role": ..., "content": ...} each."""

_SHORT = 120


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: Its place in the file, from 0.
        text: A string, or a chat.
        answer: What a reward function compares with.
        fields: The whole record.
        source: "file:line", for messages.
    """

    index: int
    text: str | Messages
    answer: str | None
    fields: Mapping[str, Any]
    source: str

    @property
    def question(self) -> str:
        """The text; of a chat, the content of its last message."""
        return self.text if isinstance(self.text, str) else str(self.text[-1]["content"])


def shorten(text: str, limit: int = _SHORT) -> str:
    """At most `limit` characters of `text`, for a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_prompts(path: Path, prompt_key: str, answer_key: str | None) -> list[Prompt]:
    """All prompts of a .jsonl or .parquet file or of a Hugging Face dataset directory. Never touches the network.

    A record without `answer_key` has no answer: whether that matters is for the reward function to say.

    Raises:
        DataError: no such file, a format that is not understood, no prompts in it, or a record that is not a prompt.
    """
    if not path.exists():
        raise DataError(f"there is no {path}", todo="name a file or a dataset directory in data.path")
    with closing(_reader(path)(path)) as records:  # a bad record leaves them half read
        prompts = [
            _prompt(index, record, f"{path.name}:{place}", prompt_key, answer_key)
            for index, (place, record) in enumerate(records)
        ]
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def split_held_out(prompts: Sequence[Prompt], held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and the last `held_out` of them, which are kept apart.

    Raises:
        DataError: nothing is left to train on.
    """
    if held_out >= len(prompts):
        raise DataError(
            f"{held_out} of {len(prompts)} prompts are to be held out, so none is left to train on",
            todo="lower data.held_out, or add prompts",
        )
    cut = len(prompts) - held_out
    return list(prompts[:cut]), list(prompts[cut:])


class PromptStream:
    """Endless batches, cut in turn from epochs that are joined end to end; each epoch is a permutation of the prompts.

    A batch depends on seed, step and size alone, so a run that is resumed needs no state of it.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The prompts of `step` (from 1) where every step takes `size`."""
        start, count = (step - 1) * size, len(self._prompts)
        epochs = {epoch: self._order(epoch) for epoch in range(start // count, (start + size - 1) // count + 1)}
        return [self._prompts[epochs[at // count][at % count]] for at in range(start, start + size)]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)).tolist()
        return order


def tokenize(prompts: Sequence[Prompt], tokenizer: Any, chat: bool) -> list[list[int]]:
    """Token ids of each prompt; `chat` applies the chat template of `tokenizer` (transformers), up to the assistant's turn.

    Raises:
        DataError: there is no chat template, a chat is to be read as plain text, or a prompt gives no tokens.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("data.chat is on, but the model's tokenizer has no chat template", todo="set data.chat=false")
    tokens = [_chat_tokens(prompt, tokenizer) if chat else _plain_tokens(prompt, tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise DataError(f"a prompt gives no tokens: {shorten(prompt.question)!r}", prompt=prompt.source)
    return tokens


def _plain_tokens(prompt: Prompt, tokenizer: Any) -> list[int]:
    if not isinstance(prompt.text, str):
        raise DataError("a prompt is a list of chat messages", todo="set data.chat=true", prompt=prompt.source)
    return list(tokenizer(prompt.text)["input_ids"])


def _chat_tokens(prompt: Prompt, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt.text}] if isinstance(prompt.text, str) else prompt.text
    try:
        # return_dict: transformers 5 answers with a BatchEncoding unless it is told not to.
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    except TemplateError as error:
        raise DataError(f"the chat template refuses a prompt: {error}", prompt=prompt.source) from error


def _prompt(index: int, record: Mapping[str, Any], source: str, prompt_key: str, answer_key: str | None) -> Prompt:
    if prompt_key not in record:
        raise DataError(
            f"a record has no {prompt_key!r}; it has {', '.join(map(repr, record)) or 'no keys'}",
            todo="set data.prompt_key to the key that holds the prompt",
            record=source,
        )
    text = record[prompt_key]
    if not (isinstance(text, str) or _is_chat(text)):
        raise DataError(
            f"{prompt_key!r} is neither a string nor a list of chat messages: {shorten(repr(text))}",
            todo='a chat message is {"role": ..., "content": ...}',
            record=source,
        )
    return Prompt(index, text, _answer(record, answer_key, source), record, source)


def _answer(record: Mapping[str, Any], answer_key: str | None, source: str) -> str | None:
    answer = record.get(answer_key) if answer_key else None
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise DataError(
        f"{answer_key!r} is neither a string nor a number: {shorten(repr(answer))}",
        todo="set data.answer_key to the key that holds the answer",
        record=source,
    )


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None for m in value)
    )


Records = Generator[tuple[int, dict[str, Any]]]
"""Each record with its line (from 1) or row (from 0)."""


def _reader(path: Path) -> Callable[[Path], Records]:
    if path.is_dir():
        return _dataset_records
    readers = {".jsonl": _jsonl_records, ".parquet": _parquet_records}
    if path.suffix not in readers:
        raise DataError(
            f"{path} is not a format that is understood",
            todo="give a .jsonl file, a .parquet file, or a directory written by datasets' save_to_disk",
        )
    return readers[path.suffix]


def _jsonl_records(path: Path) -> Records:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_object(line, path, number)


def _json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    text = shorten(line.decode(errors="replace").strip())
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"a line is not JSON: {error}: {text}", file=path, line=number) from error
    if not isinstance(record, dict):
        raise DataError(f"a line is not a JSON object: {text}", file=path, line=number)
    return record


def _parquet_records(path: Path) -> Records:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate(row for batch in file.iter_batches() for row in batch.to_pylist())
    except ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _dataset_records(path: Path) -> Records:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is not a Hugging Face dataset directory: {error}", todo="write it with datasets' save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_split(list(loaded), path)]
    yield from enumerate(dict(row) for row in loaded)


def _split(splits: list[str], path: Path) -> str:
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataError(
        f"{path} has no split 'train', and more than one other: {', '.join(splits)}",
        todo=f"name one of them, for example {path / splits[0]}",
    )
