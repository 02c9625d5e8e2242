"""The contract of a trainer: one instance a rank, each in its own Ray actor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec
from pydantic import Field

from rlbridge.roles.options import RoleOptions

if TYPE_CHECKING:
    import numpy as np

    from rlbridge.roles.batch import Batch, Sequences
    from rlbridge.roles.source import WeightSource


class TrainerOptions(RoleOptions):
    """What every trainer understands. A backend's own options model derives from it and adds its own keys."""

    backend: str = Field("native", description="Name of the trainer backend.")
    workers: int = Field(1, ge=1, description="Data-parallel ranks, one Ray actor each.")
    micro_batch: int = Field(
        0, ge=0, description="Sequences of one forward and backward pass; 0 takes all of a rank's at once."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the parameters and of the optimizer's copy.")


class AlgorithmOptions(msgspec.Struct, frozen=True):
    """The loss, as every trainer is given it (GRPO with a clipped ratio, arXiv 2402.03300; token-mean, arXiv 2503.14476)."""

    clip_low: float
    clip_high: float
    kl_coef: float


class OptimizerOptions(msgspec.Struct, frozen=True):
    """AdamW: learning rate, betas, epsilon, decoupled weight decay, gradient-norm clip (0: none), linear warm-up in steps."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    warmup_steps: int


class TrainerContext(msgspec.Struct, frozen=True):
    """Everything that a trainer rank is told at its start.

    Attributes:
        rank: This rank, of `world_size`.
        device: "cpu" or "cuda".
        model_path: A Hugging Face model directory.
        seed: The run's seed, the same on every rank.
        rendezvous: "tcp://host:port" for torch.distributed; every rank gets the same.
        timeout_seconds: The deadline of collectives.
        trust_remote_code: Whether the model directory's own Python may run.
        options: The trainer section of the config, validated by the backend's options model, as plain data.
    """

    rank: int
    world_size: int
    device: str
    model_path: str
    seed: int
    rendezvous: str
    timeout_seconds: float
    trust_remote_code: bool
    algorithm: AlgorithmOptions
    optimizer: OptimizerOptions
    options: dict[str, Any]


O = TypeVar("O", bound=TrainerOptions)  # noqa: E741  (the options model of a backend)


class Trainer(ABC, Generic[O]):
    """One rank of a training engine. Every method is collective: the core calls it on all ranks at once.

    The backend owns the forward pass, the loss, the optimizer and their parallelism; the core owns the batch, its sharding
    over the ranks, and the publishing of what `weights` describes.
    """

    @abstractmethod
    def setup(self, context: TrainerContext, options: O) -> None:
        """Join the other ranks and load the model.

        Raises:
            ModelError: the directory holds no model that this trainer can load.
        """

    @abstractmethod
    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on this rank's rows. Returns metrics of the global batch: `loss` and `grad_norm` at least."""

    @abstractmethod
    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] float32 of each completion token under the current weights, 0 elsewhere. Collective.

        The log-softmax of logits / `sequences.temperature`, as in `Completion.logprobs`.
        """

    @abstractmethod
    def weights(self) -> WeightSource:
        """What this rank holds, for the publisher. Called once an epoch."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the current weights as a Hugging Face checkpoint directory that transformers loads."""

    @abstractmethod
    def save_state(self, path: Path) -> None:
        """Write all that `load_state` needs to go on exactly: weights, optimizer, random state; sharded, each rank its part.

        Raises:
            CheckpointError: it could not be written. `path` is then incomplete and the caller discards it.
        """

    @abstractmethod
    def load_state(self, path: Path) -> None:
        """Go on from what `save_state` wrote.

        Raises:
            CheckpointError: it is damaged, or the checkpoint of another model (the first tensor that differs is named).
        """

    def close(self) -> None:
        """Leave the process group. The default does nothing."""
