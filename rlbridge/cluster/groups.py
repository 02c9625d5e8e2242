"""The actors of a role as one object: started together, called together, with a deadline on everything."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import msgspec
import numpy as np
import ray

from rlbridge.cluster.actors import GeneratorActor, TrainerActor
from rlbridge.cluster.party import ActorParty
from rlbridge.env import HERE, Place
from rlbridge.errors import DeadlineError, ResourceError
from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences, decode, encode
from rlbridge.roles.generator import GeneratorContext, GeneratorOptions
from rlbridge.roles.options import RoleOptions
from rlbridge.roles.trainer import TrainerContext, TrainerOptions
from rlbridge.sync.messages import Nothing, result

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""A backend may have processes of its own to end; one that is stuck in a collective is not waited for longer."""


class _Group:
    """Actors of one class, and the parties that the session reaches them by.

    `env` holds variables that hold wherever the actors run; those of their place, and then of `options`, come before them.
    """

    def __init__(
        self, role: str, actor_class: type, options: RoleOptions, count: int, env: dict[str, str], place: Place = HERE
    ) -> None:
        self.role = role
        # enable_tensor_transport and concurrency_groups are refused by .options() (Ray 2.60).
        declared: dict[str, Any] = {"enable_tensor_transport": True}
        if role == "generator":
            declared["concurrency_groups"] = {"sync": 2}
        remote = ray.remote(**declared)(actor_class).options(**_actor_options(options, env, place))
        backend = options.model_dump()["backend"]
        self._starting: list[Any] = []
        self.parties = [ActorParty(f"{role}[{index}]", remote.remote(backend)) for index in range(count)]

    def gather(self, refs: Sequence[Any], kind: type[T], seconds: float, what: str) -> list[T]:
        """The answers of all actors.

        Raises:
            DeadlineError: some did not answer within `seconds`; they are named.
            PeerLostError: a process is gone.
        """
        pending: dict[Future[bytes], int] = {
            p.future(ref): i for i, (p, ref) in enumerate(zip(self.parties, refs, strict=True))
        }
        answers: dict[int, T] = {}
        limit = time.monotonic() + seconds
        while pending and (left := limit - time.monotonic()) > 0:
            done, _ = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
            for future in done:  # the first failure is raised: the others may wait for it in a collective
                answers[pending.pop(future)] = result(future.result(), kind)
        if pending:
            late = [self.parties[index].name for index in sorted(pending.values())]
            raise DeadlineError(f"{', '.join(late)} did not {what} within {seconds:.0f} s", role=self.role, peer=late[0])
        return [answers[index] for index in range(len(refs))]

    def begin(self, contexts: Sequence[bytes]) -> None:
        """Begin to set up all actors; `finish` waits for them."""
        self._starting = [p.actor.setup.remote(c) for p, c in zip(self.parties, contexts, strict=True)]

    def finish(self, seconds: float) -> None:
        """Wait until all actors are set up.

        Raises:
            ResourceError: Ray could not place them, or they did not start within `seconds`.
        """
        try:
            self.gather(self._starting, Nothing, seconds, "start")
        except DeadlineError as error:
            raise ResourceError(
                f"{error.what} (cluster.start_seconds)",
                role=self.role,
                todo=f"asked: {len(self.parties)} actors; free in the cluster: {ray.available_resources()}",
            ) from error

    def end(self) -> None:
        """Let the backends close, for as long as that is worth waiting for, and end the actors."""
        closing = {p.future(p.actor.close.remote()): p.name for p in self.parties}
        done, late = wait(closing, timeout=_CLOSE_SECONDS)
        for future in [*done, *late]:
            if future in late or future.exception() is not None:
                _log.info("%s did not close and is ended as it is", closing[future])
        for party in self.parties:
            ray.kill(party.actor)


class TrainerGroup(_Group):
    """All ranks of the trainer."""

    def __init__(self, options: TrainerOptions, env: dict[str, str], place: Place = HERE) -> None:
        super().__init__("trainer", TrainerActor, options, options.workers, env, place)
        self._options = options

    def start(self, context: TrainerContext, seconds: float, *, loopback: bool) -> None:
        """Set up every rank; `context` is rank 0's, whose rank, world size and rendezvous are filled in here.

        With `loopback` the ranks meet on 127.0.0.1: all of them are on this machine.
        """
        try:
            rendezvous = ray.get(self.parties[0].actor.rendezvous.remote(loopback), timeout=seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise ResourceError(
                f"Ray placed no trainer within {seconds:.0f} s (cluster.start_seconds)",
                role="trainer",
                todo=f"asked: {self._options.workers} x {self._options.resources}; free: {ray.available_resources()}",
            ) from error
        count = len(self.parties)
        contexts = [_filled(context, rank=r, world_size=count, rendezvous=rendezvous) for r in range(count)]
        self.begin([encode(c) for c in contexts])
        self.finish(seconds)

    def train_step(self, batch: Batch, seconds: float) -> dict[str, float]:
        """One optimizer step of all ranks; each gets its rows."""
        count = len(self.parties)
        refs = [p.actor.train_step.remote(encode(batch.shard(r, count))) for r, p in enumerate(self.parties)]
        return self.gather(refs, dict[str, float], seconds, "finish a training step")[0]

    def score(self, sequences: Sequences, seconds: float) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] of the completions under the current weights."""
        payload = encode(sequences)
        replies = self.gather([p.actor.score.remote(payload) for p in self.parties], bytes, seconds, "score")
        return decode(replies[0], np.ndarray)

    def each(self, method: str, path: str, seconds: float) -> None:
        """`save`, `save_state` or `load_state` on every rank."""
        refs = [getattr(p.actor, method).remote(path) for p in self.parties]
        self.gather(refs, Any, seconds, method.replace("_", " "))


class GeneratorGroup(_Group):
    """All engines."""

    def __init__(self, options: GeneratorOptions, env: dict[str, str], place: Place = HERE) -> None:
        super().__init__("generator", GeneratorActor, options, options.workers, env, place)

    def launch(self, context: GeneratorContext) -> None:
        """Begin to set up every engine; `context` is engine 0's. `finish` waits for them."""
        count = len(self.parties)
        self.begin([encode(_filled(context, engine=e, engines=count)) for e in range(count)])

    def generate(self, prompts: list[list[int]], sampling: Sampling, seconds: float) -> list[Completion]:
        """One completion a prompt, in order. Each engine gets a run of neighbouring prompts, and a seed of its own."""
        count = len(self.parties)
        bounds = [len(prompts) * e // count for e in range(count + 1)]
        refs = []
        for e, party in enumerate(self.parties):
            seed = None if sampling.seed is None else sampling.seed * count + e
            mine = _filled(sampling, seed=seed)
            refs.append(party.actor.generate.remote(prompts[bounds[e] : bounds[e + 1]], encode(mine)))
        parts = self.gather(refs, list[Completion], seconds, "finish generating")
        return [completion for part in parts for completion in part]

    def score(self, sequences: Sequences, seconds: float) -> list[np.ndarray[Any, Any]]:
        """Log-probs [B, T] of the completions, as each engine computes them."""
        payload = encode(sequences)
        replies = self.gather([p.actor.score.remote(payload) for p in self.parties], bytes, seconds, "score")
        return [decode(reply, np.ndarray) for reply in replies]


def _filled(struct: T, **changes: Any) -> T:
    return msgspec.structs.replace(struct, **changes)  # type: ignore[type-var]


def _actor_options(options: RoleOptions, env: dict[str, str], place: Place) -> dict[str, Any]:
    resources = options.resources
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    made: dict[str, Any] = {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "runtime_env": place.runtime_env(threads | options.variables, env),
    }
    if resources.accelerator:
        made["accelerator_type"] = resources.accelerator
    return made
