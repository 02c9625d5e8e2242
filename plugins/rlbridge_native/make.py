"""A small model and its task, made on this machine in under a minute: what the tutorial and the end-to-end tests train."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from rlbridge.errors import ModelError

VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+=")
PROMPT = 6
"""Characters, and so tokens, of every prompt."""

_HELD_OUT = 256
_BATCH = 192
_LR = 1e-3
_WARMUP_STEPS = 50
_FORGETS = 0.65

Pair = tuple[int, int]
Log = Callable[[str], None]


def make_arithmetic(path: Path, seed: int, log: Log, *, steps: int = 340) -> None:
    """Make a Hugging Face model directory with `prompts.jsonl` and `held_out.jsonl` beside the weights.

    The task is the sum of two numbers of two digits. Prompts have the form "37+85=", and an answer has always three digits, the
    last digit first: "221" for 122, "520" for 25. So all prompts and all answers are of one length, an answer is right or wrong
    as text, and each digit depends only on two digits and a carry that is known by then, which so small a model soon learns.

    The model, a Qwen3, is warm-started by a teacher who forgets the carry from the units two times out of three. Its likeliest
    answers are then right where nothing is carried and wrong where something is, and half of the held-out prompts are of each
    kind. Sampled answers to nearly every prompt are right now and then, which is what reinforcement learns from. (A model of
    the same accuracy that was merely stopped early is right in a fifth of its samples, and learns several times more slowly.)

    The directory appears whole or not at all. A seed gives one model, on one kind of machine.

    Args:
        path: The directory to make. It must not exist.
        seed: Draws the held-out prompts, the initial weights and the batches.
        log: Told of the progress, a line at a time.
        steps: Supervised steps. Fewer than the default leave a model that cannot yet add.

    Raises:
        ModelError: the directory exists already.
    """
    if path.exists():
        raise ModelError(f"{path} exists already", todo="name another directory, or remove this one")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        _make(part, seed, log, steps)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make(path: Path, seed: int, log: Log, steps: int) -> None:
    transformers_logging.disable_progress_bar()
    prompts, held_out = _split(seed)
    _write_pairs(path / "prompts.jsonl", prompts)
    _write_pairs(path / "held_out.jsonl", held_out)
    _tokenizer().save_pretrained(path)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_config())
        _warm_start(model, prompts, held_out, steps, log)
    model.save_pretrained(path)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The model is too small to share out: on a busy machine two threads took eight times as long as one, waiting in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _split(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Prompts and held-out prompts; half of the latter have a carry from the units."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    carried, plain = [p for p in pairs if _carries(p)], [p for p in pairs if not _carries(p)]
    half = _HELD_OUT // 2
    held_out = set(carried[:half] + plain[:half])
    return [pair for pair in pairs if pair not in held_out], [pair for pair in pairs if pair in held_out]


def _carries(pair: Pair) -> bool:
    return pair[0] % 10 + pair[1] % 10 >= 10


def _texts(pair: Pair, *, sloppy: bool = False) -> tuple[str, str]:
    """Prompt and answer; `sloppy` forgets the carry."""
    a, b = pair
    total = a + b - (10 if sloppy and _carries(pair) else 0)
    return f"{a}+{b}=", f"{total:03d}"[::-1]


def _write_pairs(path: Path, pairs: list[Pair]) -> None:
    lines = (json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in map(_texts, pairs))
    path.write_text("\n".join(lines) + "\n")


def _tokens(pairs: list[Pair], *, sloppy: bool = False) -> torch.Tensor:
    """Prompt, answer and end of sequence, [N, 10]."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    texts = ("".join(_texts(pair, sloppy=sloppy)) for pair in pairs)
    return torch.tensor([[*(ids[character] for character in text), ids["<eos>"]] for text in texts])


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. It adds no special tokens, so prompts are the same to every engine."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def _config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64,  # engines pad to 64: an unpadded size would be one more thing that differs
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # FlashInfer has no kernel for 32 (sgl-project/sglang#6230)
        max_position_embeddings=64,
        initializer_range=0.08,  # about hidden_size ** -0.5: it learns in half the steps that the default 0.02 takes
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<bos>"),
        eos_token_id=VOCABULARY.index("<eos>"),
    )


def _warm_start(model: Qwen3ForCausalLM, prompts: list[Pair], held_out: list[Pair], steps: int, log: Log) -> None:
    """Supervised steps on the sloppy teacher's answers; the learning rate falls to nothing in the last third."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    right_NT, sloppy_NT, held_out_NT = _tokens(prompts), _tokens(prompts, sloppy=True), _tokens(held_out)
    for step in range(1, steps + 1):
        rows_B = torch.randint(len(prompts), (_BATCH,))
        forgets_B1 = torch.rand(_BATCH, 1) < _FORGETS
        tokens_BT = torch.where(forgets_B1, sloppy_NT[rows_B], right_NT[rows_B])
        lr = _LR * min(step / _WARMUP_STEPS, 3 * (steps - step + 1) / steps, 1.0)
        _supervised_step(model, optimizer, lr, tokens_BT)
        if step % 50 == 0 or step == steps:
            log(f"warm start: step {step} of {steps}, held-out accuracy {_accuracy(model, held_out_NT):.3f}")


def _supervised_step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, lr: float, tokens_BT: torch.Tensor) -> None:
    """One step on the answers; prompts are random and teach nothing."""
    logits_BKV = model(input_ids=tokens_BT[:, :-1]).logits[:, PROMPT - 1 :]
    loss = cross_entropy(logits_BKV.flatten(0, 1), tokens_BT[:, PROMPT:].flatten())
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@torch.inference_mode()
def _accuracy(model: Qwen3ForCausalLM, tokens_NT: torch.Tensor) -> float:
    """The part of the prompts whose greedy continuation is the answer and the end.

    An answer is the greedy one if each of its tokens is the likeliest after those before it: one pass tells.
    """
    likeliest_NK = model(input_ids=tokens_NT[:, :-1]).logits[:, PROMPT - 1 :].argmax(-1)
    return float((likeliest_NK == tokens_NT[:, PROMPT:]).all(-1).float().mean())
