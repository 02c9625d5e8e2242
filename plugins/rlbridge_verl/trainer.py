"""verl as a trainer: its own engine, loss and optimizer, step by step."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlbridge.errors import RlbridgeError
from rlbridge.huggingface.checkpoint import checkpoint_tensors
from rlbridge.huggingface.directory import save_directory
from rlbridge.roles.batch import Batch, Sequences, scored_rows
from rlbridge.roles.source import WeightSource
from rlbridge.roles.trainer import Trainer, TrainerContext
from rlbridge_verl.options import VerlTrainerOptions

_METRICS = {
    "clip_fraction": "actor/pg_clipfrac",
    "ppo_kl": "actor/ppo_kl",
    "entropy": "actor/entropy_loss",
    "kl": "kl_loss",
}
"""What verl's metrics are called in a run. What verl sums over micro-batches is a part of the global mean."""


class VerlTrainer(Trainer[VerlTrainerOptions]):
    """One rank of verl's engine.

    Engines compute on `model_parallel_size` ranks together. The core gives every rank rows of its own, so the rows of such a
    group are gathered first, and each of its ranks is given all of them.
    """

    def setup(self, context: TrainerContext, options: VerlTrainerOptions) -> None:
        """Join the process group, load the model into verl's engine and, if the loss has a KL, its frozen reference."""
        self._context, self._options = context, options
        if context.device == "cpu":
            os.environ["VERL_PLATFORM"] = "cpu"  # before verl is imported, which chooses then
        from rlbridge_verl import seams

        seams.check_platform()
        from rlbridge_verl import cpu_platform

        cpu_platform.register()  # before verl's engines are imported, which ask for the platform
        seams.check_trainer()
        from rlbridge_verl import engine

        if context.device == "cpu":
            cpu_platform.register_engines()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if context.device == "cuda" else "gloo",  # what verl offloads is reduced on the host
            init_method=context.rendezvous,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timedelta(seconds=context.timeout_seconds),
        )
        torch.manual_seed(context.seed)
        config = engine.model_config(context, options)
        published = torch.bfloat16 if options.lora_rank else getattr(torch, options.dtype)  # verl merges adapters in bf16
        self._model = engine.reference_model(config, published)
        self._tensors = checkpoint_tensors(self._model)
        self._engine = engine.make_engine(config, context, options)
        self._loss = engine.loss_function(context, options, self._engine.engine_config)
        self._reference = None
        if context.algorithm.kl_coef > 0 and not options.lora_rank:
            # verl keeps a frozen engine's parameters on the host, in pinned memory, which only a GPU's host has.
            frozen = context.device != "cpu"
            self._reference = engine.make_engine(config, context, options, forward_only=frozen)
        with warnings.catch_warnings():
            # verl's first step has the rate of step 0, and ours that of step 1; torch warns of a schedule that goes ahead.
            warnings.simplefilter("ignore")
            self._engine.lr_scheduler_step()
        torch.manual_seed(context.seed + context.rank)  # dropout differs over the ranks, the parameters above do not

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of verl's engine with verl's `ppo_loss`."""
        from rlbridge_verl.batches import batch_as_tensordict

        batch = self._shared_batch(batch)
        reference_BT = self._reference_logprobs(batch.sequences) if self._context.algorithm.kl_coef > 0 else None
        rows = len(batch.advantages_B)
        settings = self._settings(rows) | {"calculate_entropy": self._with_entropy}
        data = batch_as_tensordict(batch, reference_BT, settings)
        lr = float(self._engine.optimizer.param_groups[0]["lr"])
        with self._engine.train_mode():
            output = self._engine.train_batch(data, loss_function=self._loss)
        metrics = self._reduced(output)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise RlbridgeError(
                f"step {batch.step}: the loss is {metrics['loss']}, the gradient norm {metrics['grad_norm']}; verl skips such a"
                " step, and the weights are untouched",
                todo="lower optimizer.lr, or check the rewards and log-probs of this step",
                role="trainer",
                phase=f"step {batch.step}",
            )
        self._engine.lr_scheduler_step()
        return metrics | {"lr": lr}

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T]; each data-parallel rank makes those of its share of the rows."""
        rows = len(sequences.lengths_B)
        own, first = scored_rows(rows, self._engine.get_data_parallel_rank(), self._engine.get_data_parallel_size())
        scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
        found_BT = self._logprobs(self._engine, sequences.rows(own))
        if self._engine.is_mp_src_rank_with_outputs():
            last = min(first + len(own), rows)
            scores_BT[first:last] = found_BT[: last - first]
        summed_BT = torch.from_numpy(scores_BT).to(self._context.device)
        dist.all_reduce(summed_BT)
        return summed_BT.cpu().numpy()

    def weights(self) -> WeightSource:
        """See `rlbridge_verl.weights`."""
        from rlbridge_verl.weights import weight_source

        return weight_source(self._engine, self._tensors, self._context, self._options)

    def save(self, path: Path) -> None:
        """A Hugging Face directory, with the tokenizer that the model came with; adapters are merged."""
        from rlbridge_verl.weights import export_for_saving

        tensors = export_for_saving(self._engine, self._tensors, self._options)
        save_directory(tensors, self._model, Path(self._context.model_path), path)

    def save_state(self, path: Path) -> None:
        """See `rlbridge_verl.state`."""
        from rlbridge_verl.state import save_state

        save_state(self._engine, path, self._tensors)

    def load_state(self, path: Path) -> None:
        """See `rlbridge_verl.state`. The reference of the KL stays that of the run's model directory."""
        from rlbridge_verl.state import load_state

        load_state(self._engine, path, self._tensors)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _settings(self, rows: int) -> dict[str, Any]:
        """verl's non-tensor entries of a batch of so many rows on this rank."""
        options = self._options
        return {
            "use_remove_padding": options.packs,
            "use_dynamic_bsz": options.use_dynamic_bsz,
            "max_token_len_per_gpu": options.ppo_max_token_len_per_gpu,
            "micro_batch_size_per_gpu": _micro_batch(rows, options.micro_batch),
            "use_fused_kernels": False,
            "global_batch_size": rows * self._engine.get_data_parallel_size(),
            "pad_token_id": 0,
        }

    def _shared_batch(self, batch: Batch) -> Batch:
        """This rank's rows, or those of its model-parallel group."""
        ranks = self._engine.get_data_parallel_size()
        if ranks == self._context.world_size:
            return batch
        parts: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(parts, batch)
        return _joined(parts).shard(self._engine.get_data_parallel_rank(), ranks)

    def _reference_logprobs(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        if self._reference is not None:
            return self._logprobs(self._reference, sequences)
        with self._engine.disable_adapter():
            return self._logprobs(self._engine, sequences)

    def _logprobs(self, engine: Any, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] without gradients; zeros on a rank that has no outputs."""
        from rlbridge_verl.batches import completion_logprobs, sequences_as_tensordict

        rows = len(sequences.lengths_B)
        data = sequences_as_tensordict(sequences, self._settings(rows))
        with engine.eval_mode():
            output = engine.infer_batch(data)
        if not engine.is_mp_src_rank_with_outputs():
            return np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
        return completion_logprobs(output["model_output"]["log_probs"], data, sequences)

    def _reduced(self, output: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of the global batch, from those of each data-parallel rank, which one rank of its group has."""
        absent = {"entropy": not self._with_entropy, "kl": self._context.algorithm.kl_coef == 0}
        names = [name for name in _METRICS if not absent.get(name)]
        values = torch.zeros(len(names) + 3, dtype=torch.float64)
        if self._engine.is_mp_src_rank_with_outputs():
            metrics = output["metrics"]
            own = [sum(output["loss"]), metrics["grad_norm"], *(_aggregate(metrics[_METRICS[name]]) for name in names), 1.0]
            values = torch.tensor(own, dtype=torch.float64)
        values = values.to(self._context.device)
        dist.all_reduce(values)
        means = (values[:-1] / values[-1]).tolist()
        return dict(zip(["loss", "grad_norm", *names], means, strict=True))

    @property
    def _with_entropy(self) -> bool:
        return self._options.calculate_entropy or self._options.entropy_coeff > 0


def _micro_batch(rows: int, wanted: int) -> int:
    """verl cuts a batch into equal parts: the largest size up to `wanted` (0: any) that divides the rows."""
    return next(size for size in range(min(wanted or rows, rows), 0, -1) if rows % size == 0)


def _aggregate(metric: Any) -> float:
    return float(metric.aggregate()) if hasattr(metric, "aggregate") else float(np.mean(metric))


def _joined(parts: list[Batch]) -> Batch:
    """The batches of all ranks as one, in their order; `Batch.shard` has cut them from it."""
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("logprobs_BT", "advantages_B", "versions_BT")
    }
    sequences = Sequences(
        np.concatenate([part.sequences.tokens_BT for part in parts]),
        np.concatenate([part.sequences.prompt_lengths_B for part in parts]),
        np.concatenate([part.sequences.lengths_B for part in parts]),
        parts[0].sequences.temperature,
    )
    return Batch(sequences=sequences, total_tokens=parts[0].total_tokens, step=parts[0].step, **arrays)
