"""Broken parts of the protocol: publishers and engines, and generators whose ranks have broken subscribers."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import torch

from rlbridge.errors import DigestError
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import (
    Acknowledge,
    Installed,
    Nothing,
    Opened,
    OpenSource,
    Publish,
    Published,
    Pull,
    Pulled,
    State,
    Timed,
    Update,
    Wait,
    answer,
)
from rlbridge.sync.publisher import Publisher, _Slot
from rlbridge.sync.subscriber import Subscriber, Tensors
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.tensor_parallel import EngineRank

_KEPT = "sync.what_is_published_is_kept_until_it_is_acknowledged"
_EPOCH = "sync.calls_of_another_epoch_are_refused"


@broken("engine", check="sync.a_torn_engine_serves_nothing")
class ServesWhatIsTorn(Engine):
    """Serves whatever state its weights are in."""

    def _serving(self) -> None:
        pass


@broken("engine", check="sync.an_engine_refuses_an_old_version")
class InstallsOldVersions(Engine):
    """Does not look whether a version is newer than its own."""

    def _replace_weights(self, message: Update) -> Installed:
        version, self.version = self.version, 0
        try:
            return super()._replace_weights(message)
        finally:
            self.version = self.version or version


@broken("engine", check="sync.a_failed_update_is_not_served")
class ServesAfterAFailedUpdate(Engine):
    """Is ready again after an update that failed."""

    def _replace_weights(self, message: Update) -> Installed:
        try:
            return super()._replace_weights(message)
        except Exception:
            self.state = "ready"
            self.generator.resume()
            raise


@broken("engine", check="sync.a_failed_update_is_not_served")
class ServesAfterARefusedUpdate(Engine):
    """Is ready again after an update that its ranks refused."""

    def _replace_weights(self, message: Update) -> Installed:
        try:
            return super()._replace_weights(message)
        except DigestError:
            raise
        except Exception:
            self.state = "ready"
            self.generator.resume()
            raise


@broken("engine", check="sync.a_cached_prompt_is_computed_anew")
class KeepsItsCaches(Engine):
    """Drops no caches when it installs a version."""

    def _replace_weights(self, message: Update) -> Installed:
        self.generator.invalidate_caches = _nothing  # type: ignore[method-assign]
        return super()._replace_weights(message)


def _nothing() -> None:
    pass


@broken("engine", check="sync.every_token_carries_its_version")
class DoesNotTellItsVersion(Engine):
    """Does not tell the generator which version it serves."""

    def _replace_weights(self, message: Update) -> Installed:
        told = self.generator.version
        installed = super()._replace_weights(message)
        self.generator.version = told
        return installed


@broken("engine", check="sync.an_update_ends_its_pause")
class StaysPaused(Engine):
    """Does not resume after an update."""

    def _replace_weights(self, message: Update) -> Installed:
        installed = super()._replace_weights(message)
        self.generator.pause("wait")
        return installed


@broken("engine", check="sync.an_update_ends_its_pause")
class EndsItsPauseLate(Engine):
    """Does not resume before a while after an update."""

    def _replace_weights(self, message: Update) -> Installed:
        installed = super()._replace_weights(message)
        self.generator.pause("wait")
        if (before := self.__dict__.get("timer")) is not None:
            before.cancel()
        timer = self.__dict__["timer"] = threading.Timer(25, self.generator.resume)
        timer.daemon = True
        timer.start()
        return installed


@broken("engine", check="sync.versions_only_grow")
class SaysAnotherVersion(Engine):
    """Says that it holds the version before."""

    def handle(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        if method == "state":
            return [answer(lambda: State(self.state, self.version - 1))]
        return super().handle(method, payload, tensors)


@broken("engine", check="sync.versions_only_grow")
class SaysTheSameAgain(Engine):
    """Says that it holds the version before, if that is the one that it said last."""

    def handle(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        if method != "state":
            return super().handle(method, payload, tensors)
        last = self.__dict__.get("said")
        version = last if last == self.version - 1 else self.version
        self.__dict__["said"] = version
        return [answer(lambda: State(self.state, version))]


@broken("publisher", check="sync.a_publisher_refuses_an_old_version")
class PublishesOldVersions(Publisher):
    """Does not look whether a version is newer than the last."""

    def _publish(self, message: Publish) -> Published:
        self._version = 0
        return super()._publish(message)


@broken("publisher", check=_KEPT)
class IgnoresLeases(Publisher):
    """Publishes into a buffer that is being read."""

    def _check_lease(self, slot: _Slot) -> None:
        pass


@broken("publisher", check=_KEPT)
class IgnoresLeasesOfTheNewest(Publisher):
    """Publishes into a buffer that is being read, unless a later version has been acknowledged."""

    def _check_lease(self, slot: _Slot) -> None:
        if self._acknowledged > slot.version:
            super()._check_lease(slot)


@broken("publisher", check=_KEPT)
class AcknowledgesItself(Publisher):
    """Takes what it has published for received."""

    def _publish(self, message: Publish) -> Published:
        return super()._publish(msgspec.structs.replace(message, sinks=[]))


@broken("publisher", check="sync.an_acknowledgement_is_of_one_version")
class FreesEveryVersion(Publisher):
    """Takes an acknowledgement for one of all that it has published."""

    def _acknowledge(self, message: Acknowledge) -> Nothing:
        for slot in self._slots:
            slot.waiting -= set(message.sinks)
        return super()._acknowledge(message)


@broken("publisher", check="sync.an_acknowledgement_is_of_one_version")
class FreesWhatNobodyHas(Publisher):
    """Takes an acknowledgement by all for one of an earlier version too, if none of them has acknowledged that."""

    def _acknowledge(self, message: Acknowledge) -> Nothing:
        for slot in self._slots:
            if slot.waiting == set(message.sinks):
                slot.waiting = set()
        return super()._acknowledge(message)


@broken("publisher", check="sync.what_is_published_is_kept_until_all_have_it")
class FreesAVersionThatOneHas(Publisher):
    """Takes one engine's acknowledgement for everyone's."""

    def _acknowledge(self, message: Acknowledge) -> Nothing:
        waiting = [sink for slot in self._slots for sink in slot.waiting]
        return super()._acknowledge(msgspec.structs.replace(message, sinks=waiting))


@broken("publisher", check=_EPOCH)
class PublishesForAnyEpoch(Publisher):
    """Publishes a version of an epoch that is over."""

    def _publish(self, message: Publish) -> Published:
        return super()._publish(msgspec.structs.replace(message, epoch=""))


@broken("publisher", check="sync.training_right_after_a_publish_does_not_show")
class PublishesLiveWeights(Publisher):
    """Lets its peers read the weights that go on being trained."""

    def _open(self, message: OpenSource) -> Opened:
        opened = super()._open(msgspec.structs.replace(message, publish="barrier"))
        self._barrier = message.publish == "barrier"
        return opened


@broken("publisher", check="sync.weights_that_are_read_in_place_are_those_published")
class TrainsWhatIsRead(Publisher):
    """Lets weights be trained while peers read them in place."""

    def may_train(self) -> None:
        pass


@broken("publisher", check="sync.fifty_syncs_leave_nothing_behind")
class KeepsEveryVersion(Publisher):
    """Keeps a copy of all that it has published."""

    def _publish(self, message: Publish) -> Published:
        published = super()._publish(message)
        kept: list[torch.Tensor] = self.__dict__.setdefault("kept", [])
        kept += [segment.clone() for segment in self._slots[published.slot].segments]
        return published


def _made(kind: type[Subscriber], generator: ReferenceGenerator, rank: EngineRank) -> Subscriber:
    """What the twin makes, but of another class."""
    name = f"generator[{generator.context.engine}].rank[{rank.index}]"
    return kind(name, generator.make_sink(rank), generator.context.device, rank=rank.index)


class _OfAnyVersion(Subscriber):
    def _start_pull(self, message: Pull, tensors: Tensors) -> Nothing:
        version, self.version = self.version, 0
        try:
            return super()._start_pull(message, tensors)
        finally:
            self.version = version


@broken("generator", check="sync.an_engine_rank_refuses_an_old_version")
class PullsOldVersions(ReferenceGenerator):
    """Its ranks do not look whether a version is newer than their own."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_OfAnyVersion, self, rank)


class _OfAnyEpoch(Subscriber):
    def _start_pull(self, message: Pull, tensors: Tensors) -> Nothing:
        return super()._start_pull(msgspec.structs.replace(message, epoch=""), tensors)


@broken("generator", check=_EPOCH)
class PullsForAnyEpoch(ReferenceGenerator):
    """Its ranks pull a version of an epoch that is over."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_OfAnyEpoch, self, rank)


class _Trusting(Subscriber):
    def _compare(self, expected: list[bytes], found: list[bytes], version: int, phase: str, place: str) -> None:
        if phase != "verify":
            super()._compare(expected, found, version, phase, place)


@broken("generator", check="sync.bytes_that_are_not_those_published_are_not_installed")
class TrustsWhatArrives(ReferenceGenerator):
    """Its ranks do not compare the digests of what has arrived."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_Trusting, self, rank)


class _Careless(Subscriber):
    def _compare(self, expected: list[bytes], found: list[bytes], version: int, phase: str, place: str) -> None:
        if phase == "verify":
            super()._compare(expected, found, version, phase, place)


@broken("generator", check="sync.weights_that_are_not_those_published_are_not_served")
class TrustsItsInstalls(ReferenceGenerator):
    """Its ranks do not compare the digests of what they serve."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_Careless, self, rank)


class _Reusing(Subscriber):
    def _start_pull(self, message: Pull, tensors: Tensors) -> Nothing:
        self._quarantined = False
        return super()._start_pull(message, tensors)


@broken("generator", check="sync.an_arena_of_an_unfinished_transfer_is_not_used")
class ReusesAnArena(ReferenceGenerator):
    """Its ranks pull into an arena that an earlier transfer may still write into."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_Reusing, self, rank)


class _Saving(Subscriber):
    def _install(self, message: Wait) -> Timed:
        before: list[bytes] = self.__dict__.get("before", [])
        if self._verified is not None and self._verified[1] == before:
            self.state = "updating"
            return Timed(0.0)
        timed = super()._install(message)
        assert self._verified is not None
        self.__dict__["before"] = self._verified[1]
        return timed


@broken("generator", check="sync.a_torn_engine_serves_nothing")
class InstallsNothingTwice(ReferenceGenerator):
    """Its ranks do not install what they believe to hold."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_Saving, self, rank)


class _Understating(Subscriber):
    def _wait_pull(self, message: Wait) -> Pulled:
        return msgspec.structs.replace(super()._wait_pull(message), nbytes=0)


@broken("generator", check="sync.every_sync_brings_the_saved_weights")
class SaysThatNothingCame(ReferenceGenerator):
    """Its ranks say that no bytes have arrived."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return _made(_Understating, self, rank)
