"""The native generator: a transformers model in one process, on CPU or one GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlbridge.errors import DataError, LayoutError, ModelError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, module_tensors
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext
from rlbridge.roles.sink import Loader, RecordedSink
from rlbridge.sync.subscriber import Subscriber
from rlbridge.weights.layout import Piece
from rlbridge_native.decoding import decode, ends_with
from rlbridge_native.loading import load_model
from rlbridge_native.loss import micro_batches, token_logprobs
from rlbridge_native.options import NativeGeneratorOptions


class NativeGenerator(Generator[NativeGeneratorOptions]):
    """One engine of one rank. It scores with the trainer's own forward pass, so that the two agree to rounding."""

    def setup(self, context: GeneratorContext, options: NativeGeneratorOptions) -> None:
        """Load the model onto the device, and put a subscriber over its parameters."""
        transformers_logging.disable_progress_bar()
        self._context, self._options = context, options
        self._device = torch.device(context.device)
        model = load_model(
            context.model_path,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            trust_remote_code=context.trust_remote_code,
        )
        self._model = model.to(self._device).requires_grad_(False)
        # Completions without a seed differ over calls and engines, and are the same in the next run.
        self._noise = torch.Generator(self._device).manual_seed(context.seed + context.engine)
        sink = RecordedSink(checkpoint_loader(self._model), module_tensors(self._model))
        self._subscriber = Subscriber(f"generator[{context.engine}].rank[0]", sink, context.device)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, `options.batch` of them at a time.

        Raises:
            DataError: a prompt has no tokens.
            ModelError: there are stop strings, and the model directory has no tokenizer to read them with.
        """
        if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
            raise DataError(f"prompt {empty[0]} has no tokens", role="generator", todo="give it a text or a bos token")
        ends = ends_with(self._stop_ids | set(sampling.stop_token_ids), sampling.stop, self._text)
        noise = self._noise
        if sampling.seed is not None:
            noise = torch.Generator(self._device).manual_seed(sampling.seed)
        completions: list[Completion] = []
        with torch.inference_mode():
            for part in micro_batches(len(prompts), self._options.batch):
                completions += decode(self._model, prompts[part], sampling, ends=ends, noise=noise, version=self.version)
        return completions

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T], `options.batch` sequences at a time."""
        scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
        for part in micro_batches(len(sequences.lengths_B), self._options.batch):
            with torch.no_grad():
                found = token_logprobs(self._model, sequences.rows(part), self._device)
            end = found.start + found.mask.shape[1]
            scores_BT[part, found.start : end] = (found.logprobs * found.mask).cpu().numpy()
        return scores_BT

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """The engine is its own only rank."""
        return [self._subscriber.handle(method, payload, tensors)]

    def invalidate_caches(self) -> None:
        """Nothing to drop: keys and values live only as long as a call of `generate`."""

    @cached_property
    def _stop_ids(self) -> set[int]:
        """The model's own end-of-sequence tokens."""
        ids = self._model.generation_config.eos_token_id
        return set(ids) if isinstance(ids, list) else {ids} - {None}

    @cached_property
    def _tokenizer(self) -> Any:
        path, todo = self._context.model_path, "stop strings need one; use stop_token_ids instead"
        # Without its files transformers 5 makes an empty tokenizer, and says nothing.
        if not any(Path(path).glob("tokenizer*")):
            raise ModelError(f"{path} has no tokenizer", todo=todo)
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=self._context.trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}", todo=todo) from error

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text


def checkpoint_loader(model: Any) -> Loader:
    """What fills `model` from (checkpoint name, tensor) pairs.

    Raises:
        LayoutError: a checkpoint tensor is computed from parameters. The loader raises it too, for a tensor that the model
            has not, or has in another shape.
    """
    tensors, pieces = checkpoint_pieces(model)
    metas = {tensor.name: tensor for tensor in tensors}
    pieces_of: dict[str, list[Piece]] = {}
    for piece in pieces:
        pieces_of.setdefault(piece.region.tensor, []).append(piece)
    parameters = module_tensors(model)

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name not in metas:
                raise LayoutError("the generator's model has no such tensor", role="generator", tensor=name)
            meta = metas[name]
            if tuple(tensor.shape) != meta.shape:
                shapes = f"{tuple(tensor.shape)} arrives, {meta.shape} is held"
                raise LayoutError(f"a tensor of another shape: {shapes}", role="generator", tensor=name)
            for piece in pieces_of[meta.alias_of or name]:
                box = tuple(slice(o, o + n) for o, n in zip(piece.region.offset, piece.region.shape, strict=True))
                piece.view(parameters).copy_(tensor[box])

    return load
