"""The contract of a generator: one instance is one serving engine, in its own Ray actor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec
from pydantic import Field

from rlbridge.roles.options import RoleOptions

if TYPE_CHECKING:
    import numpy as np

    from rlbridge.roles.batch import Completion, Sampling, Sequences

PauseMode = Literal["keep", "wait", "abort"]


class GeneratorOptions(RoleOptions):
    """What every generator understands. A backend's own options model derives from it and adds its own keys."""

    backend: str = Field("native", description="Name of the generator backend.")
    workers: int = Field(1, ge=1, description="Engines, one Ray actor each; prompts are divided among them.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the served weights.")


class GeneratorContext(msgspec.Struct, frozen=True):
    """Everything that an engine is told at its start; `engine` counts from 0 to `engines` - 1.

    `options` is the generator section of the config, validated by the backend's options model, as plain data.
    """

    engine: int
    engines: int
    device: str
    model_path: str
    seed: int
    trust_remote_code: bool
    options: dict[str, Any]


O = TypeVar("O", bound=GeneratorOptions)  # noqa: E741  (the options model of a backend)


class Generator(ABC, Generic[O]):
    """One serving engine. It has one or more ranks; each rank holds a `Subscriber` (rlbridge.sync) over its parameters.

    The core never generates or scores on an engine whose weights are torn: it guards the calls, so a backend need not.
    `version` is set by the core at each commit and stamped on the tokens sampled after it.
    """

    version: int = 0

    @abstractmethod
    def setup(self, context: GeneratorContext, options: O) -> None:
        """Load the model.

        Raises:
            ModelError: the directory holds no model that this engine can load.
        """

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order. The same call with the same seed and weights gives the same tokens."""

    @abstractmethod
    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] float32 of each completion token under the served weights, 0 elsewhere."""

    @abstractmethod
    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """Call `Subscriber.handle(method, payload, tensors)` in every rank of the engine; the answers in rank order.

        `tensors` (what a transport that moves Ray objects delivered) is only given to backends whose ranks are Ray actors.
        """

    def pause(self, mode: PauseMode = "wait") -> None:  # an engine with no requests in flight has nothing to pause
        """Stop scheduling: `keep` holds running requests, `wait` lets them finish, `abort` ends them."""

    def resume(self) -> None:
        """Go on after `pause`."""

    @abstractmethod
    def invalidate_caches(self) -> None:
        """Drop what was computed with the old weights: prefix cache, and running KV unless it is kept on purpose."""

    def close(self) -> None:
        """Free what the engine holds. The default does nothing."""
