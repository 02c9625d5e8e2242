"""Level contract, the trainer: what it publishes, between the suite's own generator and transport."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from rlbridge.roles.batch import decode, encode
from rlbridge.sync.calls import Party
from rlbridge.weights.layout import Layout, Region
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.oracle import read_checkpoint
from rlbridge_conformance.probes import no_growth, usage
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.trainer_stages import (
    EMBED,
    HEAD,
    agree,
    each_rank_count,
    kind_of,
    most_ranks,
    moved,
    publishes_in_place,
    same,
    stage_of,
    usual_stage,
)

_LATE_SECONDS = 0.3


@check("contract", "trainer")
@each_rank_count
def test_the_layouts_cut_each_saved_tensor_once(stages: Stages, ranks: int) -> None:
    stage = stage_of(stages, ranks)
    saved = stage.saved()
    layouts = [described.layout for described in stage.layouts()]
    for rank, layout in enumerate(layouts):
        expect(f"rank {rank} announces the tensors that rank 0 announces", layouts[0].meta(), layout.meta())
    announced = {name: meta for name, meta in layouts[0].meta().items() if meta.alias_of is None}
    expect("every tensor that is saved is announced: not announced are", [], sorted(saved.keys() - announced.keys()))
    expect("only tensors that are saved are announced: surplus are", [], sorted(announced.keys() - saved.keys()))
    for name, tensor in saved.items():
        expect(f"{name} is announced as it is saved", kind_of(tensor), (announced[name].shape, announced[name].dtype))
        _is_cut_once(name, tuple(tensor.shape), layouts)


@check("contract", "trainer")
@pytest.mark.parametrize("tp", [1, 2], scope="module")
@each_rank_count
def test_the_bytes_published_are_those_saved(stages: Stages, ranks: int, tp: int) -> None:
    stage = stage_of(stages, ranks, tp=tp)
    for _ in range(5):
        stage.train()
        stage.scramble()
        stage.sync()
        stage.holds(stage.saved())


@check("contract", "trainer")
def test_a_tied_head_is_announced_as_an_alias(stages: Stages) -> None:
    stage = usual_stage(stages)
    announced = stage.layouts()[0].layout.meta()
    holds(HEAD in announced, f"a tied {HEAD} is announced", HEAD, sorted(announced))
    embedding, head = announced[EMBED], announced[HEAD]
    expect(f"{HEAD} has the shape and dtype of {EMBED}", (embedding.shape, embedding.dtype), (head.shape, head.dtype))
    if head.alias_of is not None:
        expect(f"{HEAD} is an alias of the tensor that it is tied to", EMBED, head.alias_of)
        return
    stage.train()
    saved = stage.saved()
    expect(f"{HEAD}, announced as a tensor of its own, has the values of {EMBED}", True, torch.equal(saved[HEAD], saved[EMBED]))


@check("contract", "trainer")
def test_an_untied_head_is_published_by_itself(stages: Stages) -> None:
    stage = usual_stage(stages, model="untied")
    expect(f"an untied {HEAD} is an alias of", None, stage.layouts()[0].layout.meta()[HEAD].alias_of)
    stage.train()
    stage.scramble()
    stage.sync()
    saved = stage.saved()
    stage.holds(saved)
    expect(f"an untied {HEAD} has values of its own", False, torch.equal(saved[HEAD], saved[EMBED]))


@check("contract", "trainer")
def test_a_version_is_a_copy_of_the_weights(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    stage.version += 1
    stage.session.publish(stage.version)
    saved = stage.saved()
    stage.train(2)
    expect("training after the publish moves the weights", True, moved(saved, stage.saved()))
    stage.session.pull(stage.version)
    stage.train()
    stage.session.install(stage.version)
    stage.holds(saved)


@check("contract", "trainer", needs=["trainer.multi_rank"])
def test_ranks_need_not_come_at_the_same_time(stages: Stages) -> None:
    """The core calls all ranks at once, and each comes to the call when it comes: here rank 0 does last."""
    stage = usual_stage(stages)
    stage.sync()
    sequences = stage.sequences()
    for _ in range(2):
        stage.train()
        stage.scramble()
        with _late(stage, "publish"):
            stage.sync()
        path = stage.directory / f"saved-late-{stage.version}"
        _reversed(stage, "save", str(path), kind=None)
        stage.holds(read_checkpoint(path))
        scores = decode(_reversed(stage, "score", encode(sequences), kind=bytes)[0], np.ndarray)
        agree(stage, sequences, scores)


@check("contract", "trainer")
def test_a_wider_trainer_is_rounded_to_nearest_even(stages: Stages) -> None:
    stage = stages(ranks=most_ranks(stages), model="wide", generator={"dtype": "bfloat16"})
    for _ in range(6):
        stage.train()
        saved = stage.saved()
        stage.sync()
        same("publishing rounds what it sends, and not the trainer's own weights", saved, stage.saved())
        dtypes = {box.dtype for boxes in stage.served() for box in boxes}
        expect("dtypes of the weights that arrive", {"bfloat16"}, dtypes)
        stage.holds(saved)
        halfway = sum(_halfway(t) for t in saved.values() if t.dtype == torch.float32)
        if halfway or all(t.dtype != torch.float32 for t in saved.values()):
            return
    raise Mismatch("some weight lies half-way between two bfloat16 numbers", "at least one in 6 steps", "none")


@check("contract", "trainer")
def test_a_bfloat16_trainer_publishes_what_it_saves(stages: Stages) -> None:
    stage = stages(ranks=most_ranks(stages), trainer={"dtype": "bfloat16"}, generator={"dtype": "bfloat16"})
    for _ in range(2):
        stage.train()
        stage.scramble()
        stage.sync()
        saved = stage.saved()
        stage.holds(saved)
    announced = stage.layouts()[0].layout.meta()
    for name, tensor in saved.items():
        expect(f"{name} is announced as it is saved", kind_of(tensor), (announced[name].shape, announced[name].dtype))


@check("contract", "trainer", needs=["trainer.live_storage"])
def test_weights_read_in_place_are_those_of_now(stages: Stages) -> None:
    publishes_in_place(stages(ranks=most_ranks(stages)))


@check("contract", "trainer")
def test_thirty_versions_leave_nothing_in_a_trainer(stages: Stages) -> None:
    stage = usual_stage(stages)
    for _ in range(5):
        stage.sync()
    before = [trainer.apply(usage) for trainer in stage.trainers]
    for _ in range(30):
        stage.sync()
    for trainer, was in zip(stage.trainers, before, strict=True):
        no_growth(trainer.name, was, functools.partial(trainer.apply, usage), "versions", 30)


@check("contract", "trainer")
def test_a_new_epoch_publishes_the_weights_of_now(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.sync()
    stage.session.attach()
    for _ in range(2):
        stage.train()
        stage.scramble()
        stage.sync()
        stage.holds(stage.saved())


def _reversed(stage: Stage, method: str, argument: Any, *, kind: Any) -> list[Any]:
    """Call a method on every rank, the last one first and rank 0 a little later; the answers in rank order."""
    *others, first = reversed(stage.trainers)
    futures = [trainer.begin(method, argument) for trainer in others]
    time.sleep(_LATE_SECONDS)
    futures.append(first.begin(method, argument))
    return [member.answer(f, kind, method) for member, f in zip(stage.trainers, reversed(futures), strict=True)]


@contextmanager
def _late(stage: Stage, method: str) -> Iterator[None]:
    """While it is open, the session's call of `method` reaches rank 0 a little later than the others."""
    first, *others = stage.session.trainers
    stage.session.trainers = [_Late(first, method), *others]
    try:
        yield
    finally:
        stage.session.trainers = [first, *others]


class _Late:
    """A party that gets one kind of call a little later than it is made."""

    def __init__(self, party: Party, method: str) -> None:
        self.name, self._party, self._method = party.name, party, method

    @property
    def actor(self) -> Any:
        return self._party.actor

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        if method != self._method:
            return self._party.call(method, payload, tensors)
        outer: Future[list[bytes]] = Future()

        def begin() -> None:
            self._party.call(method, payload, tensors).add_done_callback(lambda inner: _hand_on(inner, outer))

        threading.Timer(_LATE_SECONDS, begin).start()
        return outer

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        return self._party.tensors(version, slot, sink, tensor_transport)


def _hand_on(inner: Future[Any], outer: Future[Any]) -> None:
    error = inner.exception()
    if error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(inner.result())


def _is_cut_once(name: str, shape: tuple[int, ...], layouts: list[Layout]) -> None:
    """Count, for each element, the boxes that hold it; equal boxes are replicas, and count once."""
    regions = {region for layout in layouts for region in layout.regions if region.tensor == name}
    held = np.zeros(shape, dtype=np.int64)
    for region in regions:
        inside = len(region.shape) == len(shape) and all(
            o >= 0 and o + n <= m for o, n, m in zip(region.offset, region.shape, shape, strict=True)
        )
        holds(inside, f"{region} lies within its tensor", shape, region)
        held[_slices(region)] += 1
    expect(f"elements of {name} that no rank owns", 0, int((held == 0).sum()))
    expect(f"elements of {name} that are owned in two boxes which are not replicas", 0, int((held > 1).sum()))


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))


def _halfway(tensor: torch.Tensor) -> int:
    """Elements of a float32 tensor that lie half-way between two bfloat16 numbers, with the even one below."""
    bits = tensor.contiguous().view(torch.int32)
    return int(((bits & 0x1FFFF) == 0x8000).sum())
