"""Broken trainers: what they compute, keep and write."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlbridge.errors import CheckpointError, ModelError
from rlbridge.roles.batch import Batch, Sequences
from rlbridge.roles.source import ShardedSource, WeightSource
from rlbridge.roles.trainer import TrainerContext
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.checkpoint import write_tensors
from rlbridge_conformance.reference.config import NORM
from rlbridge_conformance.reference.options import ReferenceTrainerOptions
from rlbridge_conformance.reference.trainer import ReferenceTrainer

# What it computes


@broken("trainer", check="contract.every_step_moves_the_weights")
class TakesEveryOtherStep(ReferenceTrainer):
    """Counts every step, and takes every other one."""

    def train_step(self, batch: Batch) -> dict[str, float]:
        if self.step % 2 == 0:
            return super().train_step(batch)
        self.step += 1
        return {"loss": self.loss(batch), "grad_norm": 1.0}


@broken("trainer", check="contract.every_step_moves_the_weights")
class NeverMoves(ReferenceTrainer):
    """Reports steps, and takes none."""

    def move(self, name: str, tensor: torch.Tensor) -> float:
        return 1.0


@broken("trainer", check="contract.a_step_reports_finite_metrics")
class ReportsNoLoss(ReferenceTrainer):
    """Leaves the loss out of its metrics."""

    def train_step(self, batch: Batch) -> dict[str, float]:
        return {name: value for name, value in super().train_step(batch).items() if name != "loss"}


@broken("trainer", check="contract.a_step_reports_finite_metrics")
class ReportsAnInfiniteLoss(ReferenceTrainer):
    """Reports a loss that is infinite."""

    def loss(self, batch: Batch) -> float:
        return math.inf


@broken("trainer", check="contract.a_step_is_the_same_however_it_is_cut")
class TakesAStepForEachRank(ReferenceTrainer):
    """Adds up the steps of its ranks instead of taking one of them all."""

    def move(self, name: str, tensor: torch.Tensor) -> float:
        return sum(super(TakesAStepForEachRank, self).move(name, tensor) for _ in range(self.context.world_size))


@broken("trainer", check="contract.a_step_is_the_same_however_it_is_cut")
class TakesAStepForEachMicroBatch(ReferenceTrainer):
    """Takes a step twice where the batch is cut into micro-batches."""

    def move(self, name: str, tensor: torch.Tensor) -> float:
        steps = 2 if self.options.micro_batch else 1
        return sum(super(TakesAStepForEachMicroBatch, self).move(name, tensor) for _ in range(steps))


@broken("trainer", check="contract.log_probs_are_those_of_an_engine_with_the_weights")
class IgnoresTheTemperature(ReferenceTrainer):
    """Scores at temperature 1, whatever is asked for."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        return super().score(Sequences(sequences.tokens_BT, sequences.prompt_lengths_B, sequences.lengths_B))


@broken("trainer", check="contract.log_probs_are_those_of_an_engine_with_the_weights")
class RemembersItsScores(ReferenceTrainer):
    """Gives for sequences that it has scored the log-probs of that time."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        known: dict[tuple[bytes, float], np.ndarray[Any, Any]] = self.__dict__.setdefault("known", {})
        key = (sequences.tokens_BT.tobytes(), sequences.temperature)
        if key not in known:
            known[key] = super().score(sequences)
        return known[key]


@broken("trainer", check="contract.any_number_of_rows_is_scored")
class LeavesOutRowsThatDoNotDivide(ReferenceTrainer):
    """Scores equal numbers of rows on each rank, and leaves the rest at zero."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        scores = super().score(sequences)
        rows = len(scores)
        scores[rows - rows % self.context.world_size :] = 0
        return scores


@broken("trainer", check="contract.log_probs_are_zero_outside_of_completions")
class ScoresPromptsToo(ReferenceTrainer):
    """Gives log-probs of the prompts' tokens too."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        ones_B = np.ones_like(sequences.prompt_lengths_B)
        return super().score(Sequences(sequences.tokens_BT, ones_B, sequences.lengths_B, sequences.temperature))


@broken("trainer", check="contract.scoring_changes_nothing")
class DriftsWhileItScores(ReferenceTrainer):
    """Moves a norm by a millionth when it scores a sequence by itself."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        if len(sequences.lengths_B) == 1:
            self.tensors[NORM].add_(1e-6)
        return super().score(sequences)


# What it saves


@broken("trainer", check="contract.every_step_moves_the_weights")
class SavesTheWeightsOfTheStart(ReferenceTrainer):
    """Saves the weights of its first save, for ever."""

    def save(self, path: Path) -> None:
        first = self.__dict__.setdefault("first", {name: tensor.clone() for name, tensor in self.tensors.items()})
        super().save(path)
        if self.context.rank == 0:
            write_tensors(path / "model.safetensors", first)


@broken("trainer", check="contract.a_saved_directory_loads")
class ForgetsTheConfig(ReferenceTrainer):
    """Saves the weights without the config."""

    def save(self, path: Path) -> None:
        super().save(path)
        (path / "config.json").unlink(missing_ok=True)


@broken("trainer", check="contract.a_saved_directory_loads")
class SavesTheDefaultsOfTheConfig(ReferenceTrainer):
    """Saves a config that says rope_theta 1000000, whatever the model's own is."""

    def save(self, path: Path) -> None:
        super().save(path)
        if self.context.rank == 0:
            told = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(told | {"rope_theta": 1e6}))


@broken("trainer", check="contract.saving_leaves_nothing_else_behind")
class LeavesATemporaryFile(ReferenceTrainer):
    """Leaves a temporary file in the saved directory."""

    def save(self, path: Path) -> None:
        super().save(path)
        if self.context.rank == 0:
            (path / "model.safetensors.tmp").touch()


@broken("trainer", check="contract.saving_leaves_nothing_else_behind")
class LeavesADirectoryBeside(ReferenceTrainer):
    """Leaves an empty directory beside the saved one."""

    def save(self, path: Path) -> None:
        super().save(path)
        path.with_name(f"{path.name}-gathered").mkdir(exist_ok=True)


@broken("trainer", check="contract.saving_replaces_what_was_saved")
class KeepsWhatWasSaved(ReferenceTrainer):
    """Does nothing where something was saved before."""

    def save(self, path: Path) -> None:
        if not (path / "model.safetensors").exists():
            super().save(path)


@broken("trainer", check="contract.saving_keeps_the_tokenizer")
class LeavesTheTokenizerBehind(ReferenceTrainer):
    """Saves the weights without the tokenizer."""

    def save(self, path: Path) -> None:
        super().save(path)
        for file in path.glob("tokenizer*"):
            file.unlink(missing_ok=True)


# What it goes on from


@broken("trainer", check="contract.a_loaded_state_goes_on_exactly")
class ForgetsTheStep(ReferenceTrainer):
    """Saves its state without the number of steps, on which the next one depends."""

    def save_state(self, path: Path) -> None:
        super().save_state(path)
        self.state_file(path).with_suffix(".json").write_text(json.dumps({"step": 0}))


@broken("trainer", check="contract.a_loaded_state_goes_on_exactly")
class LoadsTheMatricesOnly(ReferenceTrainer):
    """Loads the matrices of a state, and leaves the norms as they are."""

    def load_state(self, path: Path) -> None:
        norms = {name: tensor.clone() for name, tensor in self.tensors.items() if tensor.dim() == 1}
        super().load_state(path)
        for name, tensor in norms.items():
            self.tensors[name].copy_(tensor)


@broken("trainer", check="contract.a_loaded_state_is_what_is_published")
class PublishesLaterStepsOnly(ReferenceTrainer):
    """Publishes the weights anew only when the number of steps has grown."""

    def weights(self) -> WeightSource:
        shown = {name: tensor.clone() for name, tensor in self.tensors.items()}
        steps = [self.step]

        def storages() -> dict[str, torch.Tensor]:
            if self.step > steps[0]:
                steps[0] = self.step
                for name, tensor in self.tensors.items():
                    shown[name].copy_(tensor)
            return shown

        return ShardedSource(self.metas(), self.pieces(), storages)


@broken("trainer", check="contract.what_is_no_state_is_refused")
class TakesNoStateForAFreshStart(ReferenceTrainer):
    """Goes on with what it has where there is no state."""

    def load_state(self, path: Path) -> None:
        if self.state_file(path).exists():
            super().load_state(path)


@broken("trainer", check="contract.what_is_no_state_is_refused")
class ClearsItsWeightsBeforeItLooks(ReferenceTrainer):
    """Sets its weights to zero before it knows whether there is a state."""

    def load_state(self, path: Path) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()
        super().load_state(path)


@broken("trainer", check="contract.a_damaged_state_is_refused")
class LoadsWhatIsLeft(ReferenceTrainer):
    """Takes a state that cannot be read to its end for a good one."""

    def load_state(self, path: Path) -> None:
        try:
            super().load_state(path)
        except CheckpointError as error:
            if "tensor" in error.where or not self.state_file(path).exists():
                raise


@broken("trainer", check="contract.the_state_of_another_model_is_refused")
class ComparesNoShapes(ReferenceTrainer):
    """Copies a state without a look at whose it is."""

    def check_state(self, found: dict[str, torch.Tensor], path: Path) -> None:
        return


# How it behaves


@broken("trainer", check="contract.what_is_no_model_is_refused")
class RaisesWhatItsReaderRaises(ReferenceTrainer):
    """Lets the error of whatever reads the model through."""

    def setup(self, context: TrainerContext, options: ReferenceTrainerOptions) -> None:
        try:
            super().setup(context, options)
        except ModelError as error:
            raise OSError(str(error)) from error


@broken("trainer", check="contract.what_is_no_model_is_refused")
class NamesNoDirectory(ReferenceTrainer):
    """Does not say which directory holds no model."""

    def setup(self, context: TrainerContext, options: ReferenceTrainerOptions) -> None:
        try:
            super().setup(context, options)
        except ModelError as error:
            raise ModelError("the model cannot be loaded") from error


@broken("trainer", check="contract.the_model_directory_is_only_read")
class WritesIntoTheModelDirectory(ReferenceTrainer):
    """Leaves what it has made of the model in the model's directory."""

    def save_state(self, path: Path) -> None:
        super().save_state(path)
        (Path(self.context.model_path) / "converted.cache").write_text(str(self.step))


@broken("trainer", check="contract.the_model_directory_is_only_read")
class LocksTheModelDirectory(ReferenceTrainer):
    """Leaves the file by which its ranks take turns at loading in the model's directory."""

    def setup(self, context: TrainerContext, options: ReferenceTrainerOptions) -> None:
        super().setup(context, options)
        (Path(context.model_path) / ".lock").touch()


@broken("trainer", check="contract.thirty_versions_leave_nothing_in_a_trainer")
class KeepsEveryVersion(ReferenceTrainer):
    """Keeps a copy of each version that it has published."""

    def weights(self) -> WeightSource:
        kept: list[dict[str, torch.Tensor]] = []

        def storages() -> dict[str, torch.Tensor]:
            kept.append({name: tensor.clone() for name, tensor in self.tensors.items()})
            return self.tensors

        return ShardedSource(self.metas(), self.pieces(), storages)


@broken("trainer", check="contract.thirty_versions_leave_nothing_in_a_trainer")
class OpensAFileForEachVersion(ReferenceTrainer):
    """Opens a file with each version, and closes none."""

    def weights(self) -> WeightSource:
        def storages() -> dict[str, torch.Tensor]:
            os.open(os.devnull, os.O_RDONLY)
            return self.tensors

        return ShardedSource(self.metas(), self.pieces(), storages)
