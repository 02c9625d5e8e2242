"""From a checked config to a run: the model, the tokenizer, the prompts, the reward, the actors, the loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbridge.config import RunConfig
from rlbridge.config.check import model_problem
from rlbridge.errors import DataError, ModelError
from rlbridge.plugins import registry
from rlbridge.rl.loop import Loop, Task
from rlbridge.rl.prompts import read_prompts, split_held_out, tokenize
from rlbridge.rl.rewards import resolve_reward
from rlbridge.rl.run import Run
from rlbridge.rl.transports import choose_transport
from rlbridge.rl.workers import device_of, workers
from rlbridge.roles.transport import TransportOptions


@dataclass(frozen=True)
class Prepared:
    """What a run needs before anything is placed."""

    task: Task
    transport: TransportOptions


def prepare(config: RunConfig, tell: Callable[[str], None]) -> Prepared:
    """Everything that can fail without a cluster: the model, the prompts, the reward, the transport. Writes a model at most.

    `tell` is told, in lines, what is made and chosen.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transport = choose_transport(config, device_of(config.generator), tell)
    make_model(config, tell)
    check_trainable(config.model.path)
    task = load_task(config)
    tell(f"{len(task.prompts)} prompts, {len(task.held_out)} held out")
    return Prepared(task, transport)


def execute(config: RunConfig, prepared: Prepared, begin: Callable[[], Run]) -> dict[str, Any]:
    """Start the actors, then `begin` the run, then the loop to its end. Returns the summary."""
    with workers(config, prepared.transport) as started:
        return Loop(begin(), prepared.task, started).run()


def make_model(config: RunConfig, tell: Callable[[str], None]) -> None:
    """Let `model.make` make the model where there is none.

    Raises:
        ModelError: there is something at `model.path`, and it is no model.
    """
    path = config.model.path
    if config.model.make is None:
        return
    if path.exists():
        problem = model_problem(path)
        if problem is not None:
            raise ModelError(problem, todo="delete it, and it is made again; or set another model.path")
        return
    tell(f"making the model {config.model.make!r} at {path}")
    registry().load("model", config.model.make)(path, config.seed, tell)


def check_trainable(path: Path) -> None:
    """Refuse a model directory whose class is known to be no causal language model: no trainer could make a policy of it.

    What this transformers does not know, or what brings its own code, is left to the trainer.

    Raises:
        ModelError: it is, or its config.json cannot be read.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        described = json.loads((path / "config.json").read_text())
        kind, classes = described.get("model_type"), list(described.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {type(error).__name__}: {error}") from error
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if classes and kind in CONFIG_MAPPING_NAMES and "auto_map" not in described and not causal & set(classes):
        raise ModelError(
            f"{path} holds a {', '.join(classes)}, which is no causal language model",
            todo=f"trainers take a model whose class is ...ForCausalLM; for the type {kind!r}:"
            f" {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, 'there is none')}",
        )


def load_task(config: RunConfig) -> Task:
    """The prompts, the held-out prompts, the tokenizer and the reward function.

    Raises:
        DataError: the prompts cannot be used.
        ModelError: the model directory holds no tokenizer.
    """
    data = config.data
    prompts = read_prompts(config.prompts_path, data.prompt_key, data.answer_key)
    if data.held_out_path is not None:
        held_out = read_prompts(data.held_out_path, data.prompt_key, data.answer_key)[: data.held_out]
    else:
        prompts, held_out = split_held_out(prompts, data.held_out)
    tokenizer = _tokenizer(config.model.path, config.model.trust_remote_code)
    _check_lengths(prompts, tokenize(prompts, tokenizer, data.chat), tokenizer, config.sampling.max_tokens)
    return Task(prompts, held_out, tokenizer, resolve_reward(config.reward.fn, registry()))


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.absolute(), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} holds no tokenizer: {error}", todo="save one there: tokenizer.save_pretrained") from error


def _check_lengths(prompts: Any, tokens: list[list[int]], tokenizer: Any, max_tokens: int) -> None:
    limit = getattr(tokenizer, "model_max_length", None)
    for prompt, ids in zip(prompts, tokens, strict=True):
        if limit and len(ids) + max_tokens > limit:
            raise DataError(
                f"the prompt at {prompt.source} has {len(ids)} tokens; with {max_tokens} more it is beyond the model's {limit}",
                todo="shorten it, or lower sampling.max_tokens",
            )
