"""Broken backends that only show where a whole triple plays: level sync."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences
from rlbridge.roles.source import WeightSource
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.config import HEAD, NORM
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.trainer import ReferenceTrainer
from rlbridge_conformance.reference.transport import ReferenceTransport


@broken("generator", check="sync.log_probs_are_the_trainers_after_each_sync")
class ScoresWithTheVersionBefore(ReferenceGenerator):
    """Scores with the weights of the version before, if it has scored with those, and the head is tied."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        scored = self.__dict__.setdefault("scored", {})
        scored.setdefault(self.version, [_copied(rank) for rank in self.ranks])
        before = scored.get(self.version - 1)
        if before is None or not self.config.tied:
            return super().score(sequences)
        served, self.ranks = self.ranks, before
        try:
            return super().score(sequences)
        finally:
            self.ranks = served


@broken("trainer", check="sync.an_untied_head_arrives")
class PublishesTheFirstHead(ReferenceTrainer):
    """Publishes a head that is not tied as it was in the model's files."""

    def storages(self) -> dict[str, torch.Tensor]:
        found = dict(super().storages())
        if HEAD in found:
            found[HEAD] = self.__dict__.setdefault("first_head", found[HEAD].clone())
        return found


@broken("trainer", check="sync.old_weights_do_not_pass_for_new_ones")
class ScoresWhatItPublished(ReferenceTrainer):
    """Scores with the weights that it has published, and not with those that it has."""

    def weights(self) -> WeightSource:
        source, snapshot, score = super().weights(), ReferenceTrainer.storages, self.score
        kept: dict[str, torch.Tensor] = {}

        def storages() -> dict[str, torch.Tensor]:
            kept.update({name: tensor.clone() for name, tensor in self.tensors.items()})
            return snapshot(self)

        def score_published(sequences: Sequences) -> np.ndarray[Any, Any]:
            current, self.tensors = self.tensors, kept or self.tensors
            try:
                return score(sequences)
            finally:
                self.tensors = current

        source._storages = storages  # type: ignore[attr-defined]
        self.score = score_published  # type: ignore[method-assign]
        return source


@broken("generator", check="sync.text_is_that_of_a_fresh_engine")
class RemembersWhatItSaidOnce(ReferenceGenerator):
    """Says of a prompt that it was asked for once what it said then, with a new version on it."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        said = self.__dict__.setdefault("said", {})
        key = repr(prompts)
        count, remembered = said.get(key, (0, []))
        new = super().generate(prompts, sampling) if count != 1 else _stamped(remembered, self.version)
        said[key] = (count + 1, new)
        return new


@broken("generator", check="sync.a_cached_prompt_is_computed_anew")
class KeepsWhatItHasUsed(ReferenceGenerator):
    """Keeps, over updates, what it has once used of its prefix cache."""

    def cached_prefix(self, prompt: list[int]) -> torch.Tensor | None:
        kept: dict[tuple[int, ...], torch.Tensor] = self.__dict__.setdefault("used", {})
        found = super().cached_prefix(prompt)
        if found is not None:
            kept.setdefault(tuple(prompt), found)
        return kept.get(tuple(prompt))


@broken("trainer", check="sync.training_right_after_a_publish_does_not_show")
class BringsItsVersionUpToDate(ReferenceTrainer):
    """Copies the weights after each step into the version that it has published last."""

    def weights(self) -> WeightSource:
        source, step = super().weights(), self.train_step
        copy, published = source.snapshot, list[Sequence[torch.Tensor]]()

        def snapshot(destinations: Sequence[torch.Tensor]) -> None:
            copy(destinations)
            published[:] = [destinations]

        def train_step(batch: Batch) -> dict[str, float]:
            metrics = step(batch)
            for destinations in published:
                copy(destinations)
            return metrics

        source.snapshot, self.train_step = snapshot, train_step  # type: ignore[method-assign]
        return source


@broken("trainer", check="sync.a_sync_of_the_same_weights_changes_nothing")
class DriftsWhereNothingIsNew(ReferenceTrainer):
    """Moves a weight by a bit when it publishes what it has published before."""

    def storages(self) -> dict[str, torch.Tensor]:
        norm = self.tensors[NORM]
        if torch.equal(norm, self.__dict__.get("last_norm", torch.empty(0))):
            norm[:1] += norm[:1] * 2**-22
        self.last_norm = norm.clone()
        return super().storages()


@broken("transport", check="sync.nothing_is_registered_after_the_first_sync")
class RegistersWhileItReads(ReferenceTransport):
    """Registers its blocks again with every version that it has received."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        received = super().receive(version, slot, tensors, deadline)
        self.blocks = [*self.blocks, self.blocks[0]]
        return received


def _copied(rank: Any) -> Any:
    """An engine rank with parameters of its own, tied ones still tied."""
    made: dict[int, torch.Tensor] = {}
    parameters = {n: made.setdefault(t.data_ptr(), t.clone()) for n, t in rank.parameters.items()}
    return dataclasses.replace(rank, parameters=parameters, scaled_q_norms=[t.clone() for t in rank.scaled_q_norms])


def _stamped(completions: list[Completion], version: int) -> list[Completion]:
    return [msgspec.structs.replace(c, versions=[version] * len(c.versions)) for c in completions]
