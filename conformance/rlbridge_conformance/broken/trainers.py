"""Broken trainers: what they publish is not what they hold. See `trainers_kept` for what they compute and write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.weights.layout import Piece, Region, TensorMeta
from rlbridge_conformance.broken import trainers_kept
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.config import EMBED, HEAD, NORM
from rlbridge_conformance.reference.gathering import RowGroup
from rlbridge_conformance.reference.trainer import ReferenceTrainer

__all__ = ["trainers_kept"]

_ONE_NORM = "model.layers.0.input_layernorm.weight"
_SQUARE = "model.layers.0.mlp.down_proj.weight"

Change = Callable[[Region, torch.Tensor, torch.Tensor], None]
"""What is done to a box, given its live weights, once it has been copied to its destination."""


class _Changed(ShardedSource):
    """A source that changes each box once it has copied it."""

    def __init__(self, trainer: ReferenceTrainer, change: Change) -> None:
        super().__init__(trainer.metas(), trainer.pieces(), trainer.storages)
        self.change = change

    def bind(self, regions: Sequence[Region]) -> None:
        super().bind(regions)
        self.regions = list(regions)

    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        super().snapshot(destinations)
        for region, live, destination in zip(self.regions, self.live(), destinations, strict=True):
            self.change(region, live, destination)


# What it announces


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class AnnouncesAnotherDtype(ReferenceTrainer):
    """Announces a float32 norm as bfloat16, and publishes it in float32."""

    def metas(self) -> list[TensorMeta]:
        found = super().metas()
        return [msgspec.structs.replace(meta, dtype="bfloat16") if meta.name == _ONE_NORM else meta for meta in found]


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class AnnouncesWhatItDoesNotSave(ReferenceTrainer):
    """Announces an empty tensor that it does not save."""

    def metas(self) -> list[TensorMeta]:
        return [*super().metas(), TensorMeta("model.rotary_emb.inv_freq", (0,), "float32")]


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class ForgetsATensor(ReferenceTrainer):
    """Announces all tensors but the last norm."""

    def metas(self) -> list[TensorMeta]:
        return [meta for meta in super().metas() if meta.name != NORM]


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class AnnouncesATransposedShape(ReferenceTrainer):
    """Announces matrices as [in, out], and saves them as [out, in]."""

    def metas(self) -> list[TensorMeta]:
        return [msgspec.structs.replace(meta, shape=meta.shape[::-1]) for meta in super().metas()]


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class OwnsTheLastRowTwice(ReferenceTrainer):
    """Owns the last row of a matrix in two boxes which are not replicas."""

    def pieces(self) -> list[Piece]:
        rows, columns = self.tensors[_SQUARE].shape
        return [*super().pieces(), self.piece(_SQUARE, (rows - 1, 0), (1, columns))]


@broken("trainer", check="contract.the_layouts_cut_each_saved_tensor_once")
class OwnsEqualParts(ReferenceTrainer):
    """Cuts tensors into parts of equal size, and leaves the rest to nobody: seen with a number of rows that does not divide."""

    def share(self, count: int) -> tuple[int, int]:
        size = count // self.context.world_size
        return self.context.rank * size, (self.context.rank + 1) * size


@broken("trainer", check="contract.a_tied_head_is_announced_as_an_alias")
class SaysNothingOfATiedHead(ReferenceTrainer):
    """Does not announce a tied head."""

    def metas(self) -> list[TensorMeta]:
        return [meta for meta in super().metas() if meta.alias_of is None]


@broken("trainer", check="contract.a_tied_head_is_announced_as_an_alias")
class TiesTheHeadToAnotherTensor(ReferenceTrainer):
    """Announces a tied head as an alias of the last norm."""

    def metas(self) -> list[TensorMeta]:
        return [msgspec.structs.replace(m, alias_of=NORM) if m.alias_of else m for m in super().metas()]


@broken("trainer", check="contract.an_untied_head_is_published_by_itself")
class TiesAnUntiedHead(ReferenceTrainer):
    """Announces a head as an alias though it is a tensor of its own."""

    def metas(self) -> list[TensorMeta]:
        return [msgspec.structs.replace(m, alias_of=EMBED) if m.name == HEAD else m for m in super().metas()]


@broken("trainer", check="contract.an_untied_head_is_published_by_itself")
class PublishesTheEmbeddingsAsTheHead(ReferenceTrainer):
    """Publishes the embeddings in the place of an untied head."""

    def storages(self) -> dict[str, torch.Tensor]:
        return {**self.tensors, HEAD: self.tensors[EMBED]}


# What it copies


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class TransposesWhatIsAskedForWhole(ReferenceTrainer):
    """Transposes square matrices, but only where it is asked for all of one."""

    def weights(self) -> WeightSource:
        def change(region: Region, live: torch.Tensor, destination: torch.Tensor) -> None:
            if region.shape == tuple(self.tensors[region.tensor].shape) and len(set(region.shape)) == 1 < len(region.shape):
                destination.copy_(live.mT)

        return _Changed(self, change)


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class TransposesASquareMatrix(ReferenceTrainer):
    """Publishes a square matrix transposed."""

    def storages(self) -> dict[str, torch.Tensor]:
        return {**self.tensors, _SQUARE: self.tensors[_SQUARE].mT.contiguous()}


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class SkipsATensor(ReferenceTrainer):
    """Copies all tensors but one into a version."""

    def weights(self) -> WeightSource:
        def change(region: Region, _live: torch.Tensor, destination: torch.Tensor) -> None:
            if region.tensor == NORM:
                destination.zero_()

        return _Changed(self, change)


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class LosesTheLastRow(ReferenceTrainer):
    """Leaves the last row of each matrix out of a version."""

    def weights(self) -> WeightSource:
        def change(region: Region, _live: torch.Tensor, destination: torch.Tensor) -> None:
            shape = self.tensors[region.tensor].shape
            if len(shape) > 1 and region.offset[0] + region.shape[0] == shape[0]:
                destination[-1].zero_()

        return _Changed(self, change)


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class SwapsKeysAndValues(ReferenceTrainer):
    """Publishes the projections of keys and values under each other's names."""

    def storages(self) -> dict[str, torch.Tensor]:
        swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}
        return {name: self.tensors[".".join(swapped.get(part, part) for part in name.split("."))] for name in self.tensors}


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class ReadsTheLastRankOneRowTooEarly(ReferenceTrainer):
    """Takes the rows of the last of several ranks from one row too early."""

    def piece(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
        found = super().piece(name, offset, shape)
        last = self.context.rank == self.context.world_size - 1 > 0
        return msgspec.structs.replace(found, offset=found.offset - found.strides[0]) if last and offset[0] else found


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class RoundsThroughBfloat16(ReferenceTrainer):
    """Rounds what it publishes to bfloat16, whatever the wire carries."""

    def weights(self) -> WeightSource:
        return _Changed(self, lambda _region, live, destination: _put(destination, live.bfloat16()))


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class RoundsANormToFloat16(ReferenceTrainer):
    """Rounds one norm to float16 on the way."""

    def weights(self) -> WeightSource:
        def change(region: Region, live: torch.Tensor, destination: torch.Tensor) -> None:
            if region.tensor == _ONE_NORM:
                destination.copy_(live.half())

        return _Changed(self, change)


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class PublishesTheFirstVersionForEver(ReferenceTrainer):
    """Publishes the weights of the start, again and again."""

    def weights(self) -> WeightSource:
        start = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return ShardedSource(self.metas(), self.pieces(), lambda: start)


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class PublishesTheEmbeddingsOfTheStart(ReferenceTrainer):
    """Publishes the embeddings that it has loaded."""

    def weights(self) -> WeightSource:
        start = self.tensors[EMBED].clone()
        return ShardedSource(self.metas(), self.pieces(), lambda: {**self.tensors, EMBED: start})


@broken("trainer", check="contract.a_version_is_a_copy_of_the_weights")
class TrainsInThePublishedCopy(ReferenceTrainer):
    """Goes on to write the weights into the version that it has published."""

    def weights(self) -> WeightSource:
        source = ShardedSource(self.metas(), self.pieces(), self.storages)
        copy, move = source.snapshot, self.move
        published: list[Sequence[torch.Tensor]] = []

        def snapshot(destinations: Sequence[torch.Tensor]) -> None:
            copy(destinations)
            published[:] = [destinations]

        def move_and_show(name: str, tensor: torch.Tensor) -> float:
            length = move(name, tensor)
            for destinations in published:
                copy(destinations)
            return length

        source.snapshot, self.move = snapshot, move_and_show  # type: ignore[method-assign]
        return source


@broken("trainer", check="contract.a_new_epoch_publishes_the_weights_of_now")
class StaysAtTheBeginningOfASecondEpoch(ReferenceTrainer):
    """Publishes, in every epoch but the first, the weights of its beginning."""

    def weights(self) -> WeightSource:
        return _SecondEpoch(self.metas(), self.pieces(), self.storages)


class _SecondEpoch(ShardedSource):
    """Stops at its second binding."""

    _bindings = 0

    def bind(self, regions: Sequence[Region]) -> None:
        super().bind(regions)
        self._bindings += 1
        if self._bindings == 2:
            stopped = {name: tensor.clone() for name, tensor in self._storages().items()}
            self._storages = lambda: stopped


# What the wire and the peers see


@broken("trainer", check="contract.a_wider_trainer_is_rounded_to_nearest_even")
class CutsOffInsteadOfRounding(ReferenceTrainer):
    """Cuts off the bits that the wire does not carry."""

    def weights(self) -> WeightSource:
        def change(_region: Region, live: torch.Tensor, destination: torch.Tensor) -> None:
            if live.dtype == torch.float32 and destination.dtype == torch.bfloat16:
                destination.copy_((live.contiguous().view(torch.int32) & -0x10000).view(torch.float32))

        return _Changed(self, change)


@broken("trainer", check="contract.a_wider_trainer_is_rounded_to_nearest_even")
class RoundsHalvesAway(ReferenceTrainer):
    """Rounds what lies half-way between two numbers of the wire's dtype away from zero, and not to the even one."""

    def weights(self) -> WeightSource:
        def change(_region: Region, live: torch.Tensor, destination: torch.Tensor) -> None:
            if live.dtype == torch.float32 and destination.dtype == torch.bfloat16:
                destination.copy_((live.contiguous().view(torch.int32) + 0x8000 & -0x10000).view(torch.float32))

        return _Changed(self, change)


@broken("trainer", check="contract.a_wider_trainer_is_rounded_to_nearest_even")
class RoundsItsOwnWeights(ReferenceTrainer):
    """Rounds its own weights to the wire's dtype when it publishes them."""

    def weights(self) -> WeightSource:
        return _Changed(self, lambda _region, live, destination: _put(live, destination))


@broken("trainer", check="contract.a_bfloat16_trainer_publishes_what_it_saves")
class AnnouncesTheDtypeOfTheFiles(ReferenceTrainer):
    """Announces the dtype of the model's files, though it holds and saves another."""

    def metas(self) -> list[TensorMeta]:
        return [msgspec.structs.replace(meta, dtype="float32") for meta in super().metas()]


@broken("trainer", check="contract.weights_read_in_place_are_those_of_now")
class ReplacesItsTensors(ReferenceTrainer):
    """Has new tensors after each step, though it claims that they can be read in place."""

    def move(self, name: str, tensor: torch.Tensor) -> float:
        self.tensors[name] = moved = tensor.clone()
        return super().move(name, moved)


@broken("trainer", check="contract.weights_read_in_place_are_those_of_now")
class LetsOthersReadACopy(ReferenceTrainer):
    """Gives out memory to be read in place that the optimizer does not write to."""

    def weights(self) -> WeightSource:
        return _LiveCopy(self.metas(), self.pieces(), self.storages)


class _LiveCopy(ShardedSource):
    """Its storage is that of its first binding."""

    def live(self) -> list[torch.Tensor]:
        if not hasattr(self, "copies"):
            self.copies = [view.clone() for view in super().live()]
        return self.copies

    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        for destination, view in zip(destinations, super().live(), strict=True):
            destination.copy_(view)


# What several ranks do together


@broken("trainer", check="contract.the_bytes_published_are_those_saved")
class PublishesAnEarlierStepOnOneRank(ReferenceTrainer):
    """Publishes, on all ranks but the first, the weights of the version before."""

    def weights(self) -> WeightSource:
        earlier = [self.tensors]

        def storages() -> dict[str, torch.Tensor]:
            now = {name: tensor.clone() for name, tensor in self.tensors.items()}
            earlier.append(now)
            return earlier[-2] if self.context.rank else now

        return ShardedSource(self.metas(), self.pieces(), storages)


@broken("trainer", check="contract.ranks_need_not_come_at_the_same_time")
class WaitsForRankZeroOnlyForAMoment(ReferenceTrainer):
    """Publishes an earlier step on the other ranks, if rank 0 does not come to the call within a tenth of a second."""

    def weights(self) -> WeightSource:
        return _Hasty(self)


class _Hasty(ShardedSource):
    """Rank 0 says by a file at which step it publishes."""

    def __init__(self, trainer: ReferenceTrainer) -> None:
        super().__init__(trainer.metas(), trainer.pieces(), lambda: self.shown)
        self.trainer, self.shown = trainer, trainer.tensors
        context = trainer.context
        port = context.rendezvous.rpartition(":")[2]
        self.mark = Path(context.model_path).parent / f"rank-0-at-{port}"
        self.earlier = {name: tensor.clone() for name, tensor in trainer.tensors.items()}

    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        now = self.trainer.tensors
        if self.trainer.context.rank == 0:
            self.mark.write_text(str(self.trainer.step))
        self.shown = now if self.comes() else self.earlier
        super().snapshot(destinations)
        self.earlier = {name: tensor.clone() for name, tensor in now.items()}

    def comes(self) -> bool:
        """Whether rank 0 comes to the same step in time."""
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            if self.mark.exists() and self.mark.read_text() == str(self.trainer.step):
                return True
            time.sleep(0.005)
        return False


@broken("trainer", check="contract.ranks_need_not_come_at_the_same_time")
class GathersInAnotherOrderOnEachRank(ReferenceTrainer):
    """Gathers its tensors in the opposite order on every rank but the first: its ranks wait for one another for ever."""

    def weights(self) -> WeightSource:
        context = self.context
        self.group = RowGroup(context.rendezvous, context.rank, context.world_size, context.timeout_seconds)

        def export() -> Iterator[tuple[str, torch.Tensor]]:
            for name in sorted(self.tensors, reverse=context.rank > 0):
                yield name, self.gathered(name, self.tensors[name])

        return GatheredSource(self.metas(), export, context.rank, context.world_size)


def _put(target: torch.Tensor, values: torch.Tensor) -> None:
    target.copy_(values)
