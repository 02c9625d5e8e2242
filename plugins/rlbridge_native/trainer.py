"""The native trainer: GRPO on a transformers model, sharded over its ranks with FSDP2."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging as transformers_logging

from rlbridge.errors import LayoutError, RlbridgeError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, checkpoint_tensors, export_full
from rlbridge.huggingface.directory import save_directory
from rlbridge.huggingface.shards import local_storages, shard_pieces
from rlbridge.roles.batch import Batch, Sequences, scored_rows
from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.roles.trainer import Trainer, TrainerContext
from rlbridge_native import state
from rlbridge_native.loading import load_model, shard_model
from rlbridge_native.loss import COUNTERS, GrpoLoss, grpo_loss, micro_batches, token_logprobs
from rlbridge_native.options import NativeTrainerOptions


class NativeTrainer(Trainer[NativeTrainerOptions]):
    """One data-parallel rank. All parameters get AdamW's decoupled weight decay, norms and biases included."""

    def setup(self, context: TrainerContext, options: NativeTrainerOptions) -> None:
        """Join the process group, load the model and, if the loss has a KL, its frozen reference."""
        self._context, self._options = context, options
        self._device = torch.device(context.device)
        self._step = 0
        transformers_logging.disable_progress_bar()
        dist.init_process_group(
            "nccl" if context.device == "cuda" else "gloo",
            init_method=context.rendezvous,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timedelta(seconds=context.timeout_seconds),
        )
        mesh = init_device_mesh(context.device, (context.world_size,))
        torch.manual_seed(context.seed)
        self._model = self._sharded(mesh)
        if options.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._reference = self._sharded(mesh).requires_grad_(False) if context.algorithm.kl_coef > 0 else None
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=context.optimizer.lr,
            betas=context.optimizer.betas,
            eps=context.optimizer.eps,
            weight_decay=context.optimizer.weight_decay,
        )
        torch.manual_seed(context.seed + context.rank)  # dropout differs over the ranks, the parameters above do not

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One GRPO step, in micro-batches whose gradients are reduced over the ranks with the last."""
        self._model.train()
        rows = list(micro_batches(len(batch.advantages_B), self._options.micro_batch))
        sums = torch.zeros(len(COUNTERS), dtype=torch.float64, device=self._device)
        for part in rows:
            self._model.set_requires_gradient_sync(part is rows[-1])
            result = self._loss(batch, part)
            torch.autograd.backward(result.loss * self._context.world_size)  # FSDP averages over the ranks; the loss is a sum
            sums += result.sums
        dist.all_reduce(sums)
        totals = dict(zip(COUNTERS, sums.tolist(), strict=True))
        norm = self._gradient_norm()
        if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
            self._optimizer.zero_grad()
            raise RlbridgeError(
                f"step {batch.step}: the loss is {totals['loss']}, the gradient norm {norm}; the weights are untouched",
                todo="lower optimizer.lr, or check the rewards and log-probs of this step",
                role="trainer",
                phase=f"step {batch.step}",
            )
        lr = self._apply_gradients(norm)
        return _metrics(totals, norm, lr, with_kl=self._reference is not None)

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T]; each rank makes those of its share of the rows."""
        own, first = scored_rows(len(sequences.lengths_B), self._context.rank, self._context.world_size)
        scores_BT = torch.zeros(sequences.tokens_BT.shape, device=self._device)
        self._model.eval()
        for part in micro_batches(len(own), self._options.micro_batch):
            scores_BT[own[part]] = self._logprobs(self._model, sequences.rows(own[part]))
        scores_BT[:first] = 0
        dist.all_reduce(scores_BT)
        return scores_BT.cpu().numpy()

    def weights(self) -> WeightSource:
        """The local shards in place; gathered tensors if some of the checkpoint's are computed from parameters."""
        context = self._context
        try:
            tensors, pieces = checkpoint_pieces(self._model)
        except LayoutError:
            return GatheredSource(
                checkpoint_tensors(self._model), lambda: export_full(self._model), context.rank, context.world_size
            )
        return ShardedSource(tensors, shard_pieces(self._model, pieces, context.rank), lambda: local_storages(self._model))

    def save(self, path: Path) -> None:
        """A Hugging Face directory, with the tokenizer that the model came with."""
        save_directory(export_full(self._model), self._model, Path(self._context.model_path), path)

    def save_state(self, path: Path) -> None:
        """See `rlbridge_native.state`."""
        state.save_state(path, self._model, self._optimizer, self._step)

    def load_state(self, path: Path) -> None:
        """See `rlbridge_native.state`. The reference of the KL stays that of the run's model directory."""
        self._step = state.load_state(path, self._model, self._optimizer)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _sharded(self, mesh: Any) -> Any:
        model = load_model(
            self._context.model_path,
            dtype=self._options.dtype,
            attn_implementation=self._options.attn_implementation,
            trust_remote_code=self._context.trust_remote_code,
        )
        shard_model(model, mesh, self._options.compute_dtype or self._options.dtype)
        return model

    def _loss(self, batch: Batch, rows: slice) -> GrpoLoss:
        sequences = batch.sequences.rows(rows)
        reference_BT = None if self._reference is None else self._logprobs(self._reference, sequences)
        current = token_logprobs(self._model, sequences, self._device)
        window = slice(current.start, current.start + current.mask.shape[1])
        return grpo_loss(
            current,
            torch.from_numpy(batch.logprobs_BT[rows, window]).to(self._device),
            torch.from_numpy(batch.advantages_B[rows]).to(self._device),
            None if reference_BT is None else reference_BT[:, window],
            self._context.algorithm,
            batch.total_tokens,
        )

    def _logprobs(self, model: Any, sequences: Sequences) -> torch.Tensor:
        """Log-probs [B, T] without gradients, 0 outside of completions."""
        logprobs_BT = torch.zeros(sequences.tokens_BT.shape, device=self._device)
        with torch.no_grad():
            found = token_logprobs(model, sequences, self._device)
            width = found.mask.shape[1]
            logprobs_BT[:, found.start : found.start + width] = found.logprobs * found.mask
        # FSDP2 leaves the root's parameters gathered after a forward pass that no backward pass follows (torch 2.13).
        model.reshard()
        return logprobs_BT

    def _gradient_norm(self) -> float:
        """The norm of the whole gradient: that of the local shards, added up over the ranks."""
        squares = torch.zeros((), dtype=torch.float32, device=self._device)
        for gradient in self._gradients():
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2
        dist.all_reduce(squares)
        return float(squares.sqrt())

    def _gradients(self) -> list[torch.Tensor]:
        grads = (parameter.grad for parameter in self._model.parameters())
        return [grad.to_local() for grad in grads if grad is not None]

    def _apply_gradients(self, norm: float) -> float:
        options = self._context.optimizer
        if options.grad_clip and norm > options.grad_clip:
            torch._foreach_mul_(self._gradients(), options.grad_clip / norm)
        self._step += 1
        lr = options.lr * min(1.0, self._step / max(options.warmup_steps, 1))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return lr


def _metrics(totals: dict[str, float], norm: float, lr: float, *, with_kl: bool) -> dict[str, float]:
    """Metrics of the global batch; means are over completion tokens."""
    tokens = max(totals["tokens"], 1.0)
    metrics = {
        "loss": totals["loss"],
        "grad_norm": norm,
        "clip_fraction": totals["clipped"] / tokens,
        "ratio_mean": totals["ratio"] / tokens,
        "entropy": totals["entropy"] / tokens,
        "lr": lr,
    }
    return metrics | ({"kl": totals["kl"] / tokens} if with_kl else {})
