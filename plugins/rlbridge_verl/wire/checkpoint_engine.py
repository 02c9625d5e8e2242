"""verl's CheckpointEngine named "rlbridge". Importing this module registers it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from rlbridge.errors import StaleVersionError, SyncError
from rlbridge_verl import seams
from rlbridge_verl.wire.meeting import Correspondent, Meeting, names_of
from rlbridge_verl.wire.options import wire_options
from rlbridge_verl.wire.sink import Sink
from rlbridge_verl.wire.source import Source, Weights

NAME = "rlbridge"
_log = logging.getLogger(__name__)


@dataclass
class _Epoch:
    """What a worker holds as long as the set of workers stays. `turn` counts its syncs."""

    name: str
    party: Correspondent
    end: Source | Sink
    turn: int = 0
    syncing: bool = False


@CheckpointEngineRegistry.register(NAME)
class RlbridgeCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """One worker's end, in a trainer rank or in a rollout worker.

    verl prepares, connects and finalises its engines at every sync. What that is for, registering and connecting, is done at
    the first sync with a set of workers, an epoch, and kept until a worker comes or goes, the tensors change, or a sync fails.

    Args:
        bucket_size: Bytes of each of a rollout worker's two buckets (`update_weights_bucket_megabytes`).
        is_master: verl's word for the trainer's first rank; all ranks send here.
        options: See `rlbridge_verl.wire.options`.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, **options: Any) -> None:
        seams.check_wire()
        self._options = wire_options(options)
        self._bucket_bytes = bucket_size
        self._worker = uuid.uuid4().hex
        self._epoch: _Epoch | None = None
        self._quarantine: list[Source | Sink] = []
        self._version: int | None = None

    def prepare(self) -> dict[str, str]:
        """Who this worker is, and the epoch that it can go on with, if any: not one whose last sync is not over here."""
        epoch = self._epoch
        return {"worker": self._worker, "epoch": "" if epoch is None or epoch.syncing else epoch.name}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: Sequence[dict[str, str]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The epoch that all workers have, or a new one with a meeting place."""
        members = hashlib.sha256("".join(each["worker"] for each in metadata).encode()).hexdigest()[:16]
        epochs = {each["epoch"] for each in metadata}
        epoch, meeting = next(iter(epochs)), None
        if len(epochs) > 1 or not epoch.startswith(members):
            epoch = f"{members}-{uuid.uuid4().hex[:8]}"
            meeting = ray.remote(Meeting).options(num_cpus=0, max_concurrency=2 * len(metadata) + 8).remote()
        sizes = (actor_wg_world_size, rollout_world_size)

        def told(side: str, count: int) -> dict[str, list[Any]]:
            same = {"side": side, "sizes": sizes, "epoch": epoch, "meeting": meeting}
            return {"index": list(range(count)), **{key: [value] * count for key, value in same.items()}}

        return told("trainer", actor_wg_world_size), told("rollout", rollout_world_size)

    def init_process_group(self, side: str, index: int, sizes: tuple[int, int], epoch: str, meeting: Any) -> None:
        """Begin the epoch, unless this worker is in it."""
        if self._epoch is not None and epoch == self._epoch.name:
            return
        self._leave()
        trainers, rollouts = names_of("trainer", sizes[0]), names_of("rollout", sizes[1])
        party = Correspondent(meeting, f"{side}[{index}]")
        if side == "trainer":
            end: Source | Sink = Source(party, self._options, self._bucket_bytes, trainers, rollouts)
        else:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
            end = Sink(party, self._options, self._bucket_bytes, trainers, device)
        self._epoch = _Epoch(epoch, party, end)

    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> dict[str, float]:
        """Publish the weights, which is collective over the trainer's ranks, and wait until every rollout worker has them.

        Raises:
            StaleVersionError: `global_steps` is older than what was sent before.
        """
        with self._sync() as (epoch, end):
            assert isinstance(end, Source)
            version = self._next(global_steps)
            metrics = await end.send(weights, epoch.turn, version)
            self._version = version
            return metrics

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Each tensor of the version, verified."""
        with self._sync() as (epoch, end):
            assert isinstance(end, Sink)
            async with contextlib.aclosing(end.receive(epoch.turn, global_steps)) as tensors:
                async for name, tensor in tensors:
                    yield name, tensor

    def finalize(self) -> None:
        """The epoch stays, for the next sync."""

    @contextlib.contextmanager
    def _sync(self) -> Iterator[tuple[_Epoch, Source | Sink]]:
        """One sync of the epoch. If it fails here, the epoch is over, and the others are told why."""
        epoch = self._epoch
        if epoch is None:
            raise SyncError("no epoch has begun", todo="verl's CheckpointEngineManager begins one")
        epoch.turn += 1
        epoch.syncing = True
        try:
            yield epoch, epoch.end
        except GeneratorExit:
            epoch.party.fail(SyncError("the rollout stopped taking weights before it had all", phase="receive"))
            self._leave(epoch)
            raise
        except BaseException as error:
            epoch.party.fail(error)
            self._leave(epoch)
            raise
        epoch.syncing = False

    def _next(self, version: int | None) -> int:
        """The version that is asked for, or the next one. verl sends one again after it has been resumed."""
        last = self._version
        if version is None:
            return 1 if last is None else last + 1
        if last is not None and version < last:
            raise StaleVersionError(
                f"version {version} is older than version {last}, which the rollouts have",
                version=version,
                phase="publish",
                todo="global_steps only grow within a job",
            )
        return version

    def _leave(self, epoch: _Epoch | None = None) -> None:
        """End an epoch here, the current one if none is given; what a late read may still write into is kept."""
        leaving = epoch or self._epoch
        if self._epoch is leaving:
            self._epoch = None
        ends = [*self._quarantine, *([leaving.end] if leaving else [])]
        self._quarantine = [end for end in ends if not end.close()]
