"""A small model and its task, made on this machine in under a minute: what the tutorial and the end-to-end tests train."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlbridge.errors import ModelError

VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+=")
PAD, BOS, EOS, UNKNOWN = range(4)
HELD_OUT = 256
LEAST, MOST = 0.50, 0.58
"""The accuracy between which the warm start ends."""

Pair = tuple[int, int]


def make_arithmetic(path: Path, seed: int, log: Callable[[str], None], *, max_steps: int = 2000) -> None:
    """Make a Hugging Face model directory with `prompts.jsonl` and `held_out.jsonl` beside the weights.

    The task is the sum of two numbers of two digits. Prompts all have the form "37+85=", and the answer has always three digits,
    the last digit first: "221" for 122, "520" for 25. So prompts and answers are of one length, an answer is right or wrong as
    text, and a digit depends only on digits and a carry that came before it, which so small a model learns soon.

    The model (Qwen3, 0.6 million parameters) is warm-started by supervised steps on all prompts and stopped early, while its greedy
    answers to the held-out prompts are right `LEAST` to `MOST` of the time: unsure of most prompts rather than ignorant of some,
    since reinforcement learns only from prompts that are answered right now and then.

    The directory appears whole or not at all. One seed gives one model, on one machine and number of threads.

    Args:
        path: The directory to make. It must not exist.
        seed: Draws the held-out prompts, the initial weights and the batches.
        log: Told of the progress, a line at a time.
        max_steps: The most supervised steps; what the model can do by then is taken.

    Raises:
        ModelError: the directory exists already, or the warm start did not get to `LEAST` within `max_steps` (of 100 and more).
    """
    if path.exists():
        raise ModelError(f"{path} exists already", todo="Name another directory, or remove this one.")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        prompts, held_out = _split(seed)
        _write_pairs(part / "prompts.jsonl", prompts)
        _write_pairs(part / "held_out.jsonl", held_out)
        _tokenizer().save_pretrained(part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(_config())
            _warm_start(model, prompts, held_out, max_steps, log)
        model.save_pretrained(part)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log(f"made {path}: {len(prompts)} prompts, {len(held_out)} held out")
