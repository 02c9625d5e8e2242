"""verl's CheckpointEngine named "rlbridge". Importing this module registers it."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from rlbridge.errors import RlbridgeError, StaleVersionError
from rlbridge.weights.plan import ALIGNMENT
from rlbridge_verl import seams
from rlbridge_verl.wire.meeting import Correspondent, Meeting
from rlbridge_verl.wire.options import wire_options
from rlbridge_verl.wire.sink import Sink
from rlbridge_verl.wire.source import Source, Weights

NAME = "rlbridge"
_log = logging.getLogger(__name__)


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
        self._bucket = bucket_size
        self._worker = uuid.uuid4().hex
        self._epoch = ""
        self._party: Correspondent | None = None
        self._end: Source | Sink | None = None
        self._quarantine: list[Sink] = []
        self._turn = 0
        self._version: int | None = None

    def prepare(self) -> dict[str, str]:
        """Who this worker is, and the epoch that it can go on with, if any."""
        return {"worker": self._worker, "epoch": self._epoch}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: Sequence[dict[str, str]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The epoch that all workers have, or a new one with a meeting place."""
        members = hashlib.sha256("".join(m["worker"] for m in metadata).encode()).hexdigest()[:16]
        epochs = {m["epoch"] for m in metadata}
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
        if epoch == self._epoch:
            return
        self._leave()
        trainers, rollouts = sizes
        party = Correspondent(meeting, f"{side}[{index}]")
        round_bytes = max(self._bucket // trainers // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        if side == "trainer":
            self._end = Source(party, self._options, round_bytes, index, trainers, rollouts)
        else:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
            self._end = Sink(party, self._options, round_bytes, trainers, device)
        self._party, self._epoch, self._turn = party, epoch, 0

    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> dict[str, float]:
        """Publish the weights, which is collective over the trainer's ranks, and wait until every rollout worker has them.

        Raises:
            StaleVersionError: `global_steps` is older than what was sent before.
        """
        end = self._end
        assert isinstance(end, Source)
        self._turn += 1
        try:
            version = self._next(global_steps)
            metrics = await end.send(weights, self._turn, version)
        except BaseException as error:
            await self._fail(error)
            raise
        self._version = version
        return metrics

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Each tensor of the version, verified."""
        end = self._end
        assert isinstance(end, Sink)
        self._turn += 1
        try:
            async for name, tensor in end.receive(self._turn, global_steps):
                yield name, tensor
        except BaseException as error:
            await self._fail(error)
            raise

    def finalize(self) -> None:
        """The epoch stays, for the next sync."""

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

    async def _fail(self, error: BaseException) -> None:
        """Leave the epoch, and tell the others why."""
        party = self._party
        self._leave()
        if party is None:
            return
        try:
            await party.fail(error)
        except RlbridgeError as second:
            _log.warning("%s could not tell the others of its failure: %s", party.name, second)

    def _leave(self) -> None:
        self._quarantine = [sink for sink in self._quarantine if not sink.close()]
        if isinstance(self._end, Source):
            self._end.close()
        elif self._end is not None and not self._end.close():
            self._quarantine.append(self._end)
        self._end, self._party, self._epoch = None, None, ""
