"""The two ends of verl's wire over NIXL, without verl: what arrives, when, and what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from rlbridge.errors import ConfigError, DeadlineError, DigestError, LayoutError, StaleVersionError
from rlbridge_verl.wire import sink as sink_module
from rlbridge_verl.wire import source as source_module
from rlbridge_verl.wire.sink import Sink
from tests.verl.parties import Tensors, parties

BUCKET = 4096


def weights(seed: int = 0) -> Tensors:
    """Several buckets; one tensor is larger than a bucket, one is empty, and not all are contiguous or floating."""
    torch.manual_seed(seed)
    return [
        ("embed", torch.randn(100, 30)),
        ("norm", torch.randn(30)),
        ("none", torch.randn(0, 30)),
        ("turned", torch.randn(20, 30).T),
        ("half", torch.randn(33).bfloat16()),
        ("count", torch.randint(0, 1000, (17,))),
        ("mask", torch.rand(5) > 0.5),
        *((f"layer.{index}", torch.randn(25, 30)) for index in range(6)),
        ("scalar", torch.tensor(seed + 0.5)),
    ]


def assert_equal(received: list[Tensors], wanted: Tensors) -> None:
    for tensors in received:
        assert [name for name, _ in tensors] == [name for name, _ in wanted]
        for (name, tensor), (_, other) in zip(tensors, wanted, strict=True):
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other), name


def test_every_sync_brings_every_tensor_and_only_the_first_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    for module in (source_module, sink_module):
        original = module.open_transport

        def count(*arguments: object, original: object = original) -> object:
            opened.append(arguments)
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(module, "open_transport", count)
    with parties(BUCKET) as them:
        for version in (1, 2, 3):
            tensors = weights(version)
            assert_equal(them.sync(tensors, version), tensors)
        assert len(opened) == 4
        for sink in them.sinks:
            assert sum(bucket.numel() for bucket in sink._buckets) <= 2 * BUCKET


def test_floating_tensors_are_cast_at_the_source() -> None:
    with parties(BUCKET, dtype="bfloat16") as them:
        tensors = [(name, tensor.bfloat16() if tensor.is_floating_point() else tensor) for name, tensor in weights()]
        assert_equal(them.sync(weights(), 1), tensors)
        assert_equal(them.sync(weights(), 2), tensors)


def test_a_bucket_is_read_while_the_next_is_gathered() -> None:
    taken = threading.Event()

    def gather(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors[:-1]
        assert taken.wait(20)
        yield tensors[-1]

    with parties(BUCKET) as them:
        them.sync(weights(), 1)
        tensors = weights(1)
        sent = them.send([gather(tensors), gather(tensors)], 2)
        received = [future.result() for future in them.receive(2, lambda _: taken.set())]
        assert_equal(received, tensors)
        assert all(future.result() for future in sent)


def test_no_tensor_of_a_bucket_that_changed_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    original = source_module.digests
    calls = []

    def flip(stripes: list[torch.Tensor]) -> list[bytes]:
        found = original(stripes)
        calls.append(stripes)
        if len(calls) == 6:  # of bucket 2 on one rank: there are two ranks
            stripes[0][0] ^= 1
        return found

    names: list[str] = []
    with parties(BUCKET) as them:
        monkeypatch.setattr(source_module, "digests", flip)
        sent = them.send([weights(), weights()], 1)
        for future in them.receive(1, names.append):
            with pytest.raises(DigestError, match="is not what it published") as caught:
                future.result()
        assert caught.value.where["phase"] == "verify"
        bad = caught.value.where["tensor"]
        assert bad not in names
        them.fail(caught.value)
        for each in sent:
            with pytest.raises(DigestError):
                each.result()


def test_an_export_that_changes_is_refused_by_name_on_every_rank() -> None:
    with parties(BUCKET) as them:
        them.sync(weights(), 1)
        other = weights()
        other[7] = ("layer.0", torch.randn(25, 31))
        for future in them.send([other, other], 2):
            with pytest.raises(LayoutError, match=r"'layer\.0' \[25, 31\] float32, where there was 'layer\.0' \[25, 30\]"):
                future.result()
        for future in them.send([weights()[:-1], weights()[:-1]], 3):
            with pytest.raises(LayoutError, match="13 tensors, where there were 14"):
                future.result()


def test_ranks_that_export_different_tensors_are_named() -> None:
    with parties(BUCKET, setup_seconds=5) as them:
        sent = them.send([weights(), weights()[::-1]], 1)
        for future in them.receive(1):
            with pytest.raises(LayoutError, match=r"other tensors on trainer\[1\] than on trainer\[0\]") as caught:
                future.result()
        them.fail(caught.value)
        for each in sent:
            with pytest.raises(LayoutError):
                each.result()


def test_buckets_of_two_sizes_are_refused() -> None:
    with parties(BUCKET, setup_seconds=5) as them:
        them.sinks[1]._bucket_bytes *= 2
        them.send([weights(), weights()], 1)
        with pytest.raises(ConfigError, match="update_weights_bucket_megabytes has to be the same for all"):
            them.receive(1)[1].result()


def test_a_version_that_nobody_asked_for_is_refused() -> None:
    with parties(BUCKET) as them:
        them.sync(weights(), 1)
        them.send([weights(), weights()], 2)
        for future in them.receive(3):
            with pytest.raises(StaleVersionError, match=r"trainer\[0\] publishes version 2, and version 3 is asked for"):
                future.result()


def test_waiting_ends_and_names_who_did_not_come() -> None:
    with parties(BUCKET, deadline_seconds=1, setup_seconds=5) as them:
        them.sync(weights(), 1)
        them.turn += 1
        (stuck, *_), (first, _) = them.receive(2), them.sources
        first._tell(them.turn, 2, 0).result()
        with pytest.raises(DeadlineError, match=r"^trainer\[1\] did not get through publish") as caught:
            stuck.result()
        assert caught.value.where["rank"] == "rollout[0]"


def test_a_rollout_that_stops_taking_can_close_at_once() -> None:
    begun, over = threading.Event(), threading.Event()

    async def begin(sink: Sink) -> None:
        stream = sink.receive(them.turn, 2)
        async for name, _ in stream:
            if name == "layer.4":
                break  # and the last bucket, which has the scalar, is asked for
        await stream.aclose()

    def gather(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors[:-1]
        begun.set()
        assert over.wait(20)
        yield tensors[-1]

    with parties(BUCKET) as them:
        them.sync(weights(), 1)
        them.send([gather(weights()), gather(weights())], 2)
        assert begun.wait(20)
        start = time.monotonic()
        asyncio.run(begin(them.sinks[0]))
        assert them.sinks[0].close()
        assert time.monotonic() - start < 10  # though the last bucket is not there yet
        over.set()
