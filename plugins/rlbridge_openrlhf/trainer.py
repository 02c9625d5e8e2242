"""OpenRLHF as a trainer: its actor, its loss and its DeepSpeed strategy, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from rlbridge.huggingface.directory import save_directory
from rlbridge.roles.batch import Batch, Sequences, scored_rows
from rlbridge.roles.source import WeightSource
from rlbridge.roles.trainer import Trainer, TrainerContext
from rlbridge_openrlhf import seams, state
from rlbridge_openrlhf.experience import as_experience, logprobs_under
from rlbridge_openrlhf.loading import make_actor, prepare_for_training
from rlbridge_openrlhf.options import OpenRLHFTrainerOptions
from rlbridge_openrlhf.partitions import export, tensors_of, weight_source
from rlbridge_openrlhf.policy import Policy
from rlbridge_openrlhf.strategy import Strategy


class OpenRLHFTrainer(Trainer[OpenRLHFTrainerOptions]):
    """One data-parallel rank."""

    def setup(self, context: TrainerContext, options: OpenRLHFTrainerOptions) -> None:
        """Join the process group, load the model into DeepSpeed's engine and, if the loss has a KL, its frozen reference."""
        self._context, self._options = context, options
        transformers_logging.disable_progress_bar()
        strategy = Strategy(context, options)
        strategy.setup_distributed()
        torch.manual_seed(context.seed)
        self._actor, self._described = make_actor(context, options, strategy.get_ds_train_config())
        self._reference = None
        if context.algorithm.kl_coef > 0:
            reference, _ = make_actor(context, options, strategy.get_ds_eval_config())
            self._reference = strategy.prepare(reference)
        schedule = prepare_for_training(strategy, self._actor, context)
        seams.check_engine(self._actor.model)
        self._strategy = strategy
        self._policy = Policy(strategy, self._actor, schedule, context.algorithm, options)
        torch.manual_seed(context.seed + context.rank)  # dropout differs over the ranks, the parameters above do not

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of `ActorPPOTrainer.training_step`, in micro-batches."""
        rows, size = len(batch.advantages_B), self._options.micro_batch
        cuts = [slice(at, min(at + (size or rows), rows)) for at in range(0, rows, size or rows)]
        lr = float(self._policy.actor_scheduler.get_last_lr()[0])
        self._strategy.step = batch.step
        self._strategy.loss.zero_()
        parts = []
        for cut in cuts:
            experience = as_experience(batch, cut, self._context.device)
            if self._reference is not None:
                reference_BT = logprobs_under(self._reference, batch.sequences.rows(cut), self._context.device)
                width = experience.action_mask.shape[1] + 1
                experience.base_action_log_probs = torch.from_numpy(reference_BT[:, 1:width]).to(self._context.device)
            self._actor.temperature = batch.sequences.temperature
            self._begin_micro_batch(is_last=cut is cuts[-1])
            parts.append(self._policy.micro_batch(experience, batch.total_tokens))
        return self._policy.metrics(parts, lr)

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T]; each rank makes those of its share of the rows."""
        own, first = scored_rows(len(sequences.lengths_B), self._context.rank, self._context.world_size)
        size = self._options.micro_batch or len(own)
        scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
        for at in range(0, len(own), size):
            some = own[at : at + size]
            scores_BT[some] = logprobs_under(self._actor, sequences.rows(some), self._context.device)
        scores_BT[:first] = 0
        summed_BT = torch.from_numpy(scores_BT).to(self._context.device)
        dist.all_reduce(summed_BT)
        return summed_BT.cpu().numpy()

    def weights(self) -> WeightSource:
        """See `rlbridge_openrlhf.partitions`."""
        return weight_source(self._module, self._options.weights)

    def save(self, path: Path) -> None:
        """A Hugging Face directory, with the tokenizer that the model came with."""
        save_directory(export(self._module), self._described, Path(self._context.model_path), path)

    def save_state(self, path: Path) -> None:
        """See `rlbridge_openrlhf.state`."""
        state.save_state(self._actor.model, path, tensors_of(self._module))

    def load_state(self, path: Path) -> None:
        """See `rlbridge_openrlhf.state`. The reference of the KL stays that of the run's model directory."""
        state.load_state(self._actor.model, path, tensors_of(self._module))

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _module(self) -> Any:
        """The transformers model in DeepSpeed's engine."""
        return self._actor.model.module

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        self._strategy.is_last = is_last
        self._actor.model.set_gradient_accumulation_boundary(is_last)
