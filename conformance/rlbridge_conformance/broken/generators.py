"""Broken generators: what they ask for, what they install, and what they make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.batch import Sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.sink import RecordedSink, WeightSink
from rlbridge.sync.subscriber import Subscriber
from rlbridge.weights.layout import Layout, Region, TensorMeta
from rlbridge_conformance.broken import generators_setup, generators_text  # noqa: F401  (the others)
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.config import EMBED, NORM
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.model import RankWeights, completion_logprobs
from rlbridge_conformance.reference.options import ReferenceGeneratorOptions
from rlbridge_conformance.reference.tensor_parallel import EngineRank, Projection

_WHOLE = "contract.the_layout_is_whole_and_always_the_same"
_REFUSED = "contract.another_models_tensors_are_refused"
_SCRAMBLE = "contract.a_scramble_shows_in_every_tensor"
_INSTALLED = "contract.each_sync_installs_the_saved_weights"
_GROWTH = "contract.thirty_syncs_leave_nothing_behind"
_LOG_PROBS = "contract.log_probs_are_those_of_the_trainer"
_DERIVED = "contract.what_is_derived_follows_an_update"
_DTYPE = "contract.weights_are_served_in_the_dtype_asked_for"
_RANKS = "contract.every_rank_answers_for_itself"

_FUSED = "gate_up_proj"


class TwoRanks(ReferenceGenerator):
    """The correct twin of those that break a rule of tensor-parallel ranks: it always has two."""

    def load_model(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        super().load_model(context, options.model_copy(update={"tp": 2}))


class Sink(RecordedSink):
    """The reference generator's sink, for those to derive from that break a rule of sinks."""

    def __init__(self, generator: ReferenceGenerator, rank: EngineRank) -> None:
        self.generator = generator
        super().__init__(lambda weights: generator.load(rank, weights), rank.parameters, lambda: generator.refresh(rank))


# What they ask for


class _Accumulating(Sink):
    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        before, layout = list(self._pieces), super().record(tensors)
        self._pieces += before
        return Layout(layout.tensors, [piece.region for piece in self._pieces])

    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        super().bind(regions)
        self._pieces = []


@broken("generator", check=_WHOLE)
class AsksForMoreEachTime(ReferenceGenerator):
    """Adds to what it has recorded, until it is bound."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Accumulating(self, rank)


class _Short(Sink):
    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        layout = super().record(tensors)
        regions = list(layout.regions)
        last = next(index for index, region in enumerate(regions) if region.tensor == NORM)
        regions[last] = Region(NORM, (0,), (regions[last].shape[0] - 1,))
        self._pieces[last] = self._pieces[last].narrow(regions[last])
        return Layout(layout.tensors, regions)


@broken("generator", check=_WHOLE)
class LosesTheLastRow(ReferenceGenerator):
    """Does not ask for the last element of a norm."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Short(self, rank)


class _Overwriting(Sink):
    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        layout = super().record(tensors)
        self._load((t.name, torch.zeros(t.shape, dtype=getattr(torch, t.dtype))) for t in tensors)
        return layout


@broken("generator", check="contract.recording_leaves_the_weights_alone")
class RecordsIntoLiveWeights(ReferenceGenerator):
    """Loads placeholders into what it serves when it is asked for its layout."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Overwriting(self, rank)


@broken("generator", check="contract.names_may_come_in_any_order")
class TakesTheFirstForTheGate(ReferenceGenerator):
    """Takes whichever of gate and up comes first for the gate."""

    def load_gate_up(self, rank: EngineRank, name: str, kind: str, tensor: torch.Tensor) -> None:
        seen: set[str] = self.__dict__.setdefault("seen", set())
        fused = name.replace(kind, _FUSED)
        rank.parameters[fused].chunk(2)[fused in seen].copy_(tensor.chunk(self.options.tp)[rank.index])
        seen ^= {fused}


@broken("generator", check=_REFUSED)
class SwallowsASurplusTensor(ReferenceGenerator):
    """Says nothing of a tensor that it does not know."""

    def load(self, rank: EngineRank, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load(rank, ((name, tensor) for name, tensor in weights if name in self.shapes))


@broken("generator", check=_REFUSED)
class CutsATensorToSize(ReferenceGenerator):
    """Takes of a tensor that is too large what it has room for."""

    def load(self, rank: EngineRank, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        sizes = {name: tuple(slice(0, n) for n in shape) for name, shape in self.shapes.items()}
        super().load(rank, ((name, tensor[sizes[name]] if name in sizes else tensor) for name, tensor in weights))


class _Forgiving(Sink):
    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        own = {meta.name for meta in tensors}
        lacking = [
            TensorMeta(name, shape, "float32") for name, shape in self.generator.config.shapes().items() if name not in own
        ]
        layout = super().record([*tensors, *lacking])
        self._pieces = [piece for piece in self._pieces if piece.region.tensor in own]
        return Layout([meta for meta in layout.tensors if meta.name in own], [piece.region for piece in self._pieces])


@broken("generator", check=_REFUSED)
class DoesWithoutAMissingTensor(ReferenceGenerator):
    """Keeps what it has of a tensor that nobody publishes."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Forgiving(self, rank)


@broken("generator", check=_RANKS)
class AnswersInAnotherOrder(TwoRanks):
    """Gives what the last rank shows as the first rank's."""

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        answers = super().on_each_rank(method, payload, tensors)
        return answers[::-1] if method == "read" else answers


@broken("generator", check=_RANKS)
class AsksItsFirstRankAlone(TwoRanks):
    """Gives the first rank's answer as every rank's."""

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        return [self.subscribers[0].handle(method, payload, tensors)] * len(self.subscribers)


@broken("generator", check="contract.engines_serve_the_same")
class NamesItsRanksAsEveryEngineDoes(ReferenceGenerator):
    """Gives its ranks the names of the first engine's."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        return Subscriber(f"generator[0].rank[{rank.index}]", self.make_sink(rank), rank=rank.index)


# What they install


class _Saving(Sink):
    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        super().bind(regions)
        self.last: list[torch.Tensor] = []

    def install(self, sources: Sequence[torch.Tensor]) -> None:
        last = self.last or [torch.full_like(source, 3) for source in sources]
        super().install([view if a.equal(b) else a for view, a, b in zip(self.live(), sources, last, strict=True)])
        self.last = [source.clone() for source in sources]


@broken("generator", check=_INSTALLED)
class InstallsWhatIsNew(ReferenceGenerator):
    """Installs only what differs from what it was given last."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Saving(self, rank)


class _Wearing(Sink):
    times = 0

    def install(self, sources: Sequence[torch.Tensor]) -> None:
        super().install(sources)
        self.times += 1
        if self.times > 1:
            self.live()[0].view(-1)[0] += 1


@broken("generator", check=_INSTALLED)
class InstallsWellOnce(ReferenceGenerator):
    """Spoils an element with each install but the first."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Wearing(self, rank)


class _Unscrambled(Sink):
    def scramble(self) -> None:
        pass


@broken("generator", check=_SCRAMBLE)
class ScramblesNothing(ReferenceGenerator):
    """Keeps its weights when they are to be scrambled."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Unscrambled(self, rank)


class _ShowingTheArena(Sink):
    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        super().bind(regions)
        self.arena: list[torch.Tensor] = []

    def install(self, sources: Sequence[torch.Tensor]) -> None:
        self.arena = []
        super().install(sources)
        self.arena = list(sources)

    def live(self) -> list[torch.Tensor]:
        return self.arena or super().live()


@broken("generator", check=_SCRAMBLE)
class ShowsTheArena(ReferenceGenerator):
    """Shows what has arrived, and not what it serves."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _ShowingTheArena(self, rank)


class _Refusing(Sink):
    def install(self, sources: Sequence[torch.Tensor]) -> None:
        if all(view.equal(source) for view, source in zip(self.live(), sources, strict=True)):
            raise LayoutError("nothing has arrived")
        super().install(sources)


@broken("generator", check="contract.an_update_without_a_change_changes_nothing")
class RefusesWhatItHolds(ReferenceGenerator):
    """Takes an update that changes nothing for one that has failed."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Refusing(self, rank)


class _OneBox(Sink):
    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        super().bind(regions)
        first = {index: view for (index, _), view in zip(reversed(regions), reversed(self._views), strict=True)}
        self._views = [first[i] if first[i].shape == v.shape else v for (i, _), v in zip(regions, self._views, strict=True)]


@broken("generator", check="contract.any_number_of_trainer_ranks_will_do")
class PutsAllBoxesInOnePlace(ReferenceGenerator):
    """Puts every box of a region where its first one belongs."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _OneBox(self, rank)


class _Hoarding(Sink):
    def install(self, sources: Sequence[torch.Tensor]) -> None:
        super().install(sources)
        self.__dict__.setdefault("kept", []).append([source.clone() for source in sources])


@broken("generator", check=_GROWTH)
class KeepsACopyOfEachVersion(ReferenceGenerator):
    """Keeps what it was given."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Hoarding(self, rank)


class _LeavingFilesOpen(Sink):
    def install(self, sources: Sequence[torch.Tensor]) -> None:
        super().install(sources)
        self.__dict__.setdefault("files", []).append(Path("/dev/null").open())  # noqa: SIM115


@broken("generator", check=_GROWTH)
class LeavesAFileOpen(ReferenceGenerator):
    """Opens a file for each version, and closes none."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _LeavingFilesOpen(self, rank)


@broken("generator", check=_DTYPE)
class HoldsFloat32Whatever(ReferenceGenerator):
    """Holds its weights in float32, whatever the options say."""

    def make_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.options = self.options.model_copy(update={"dtype": "float32"})
        return super().make_parameters(tensors)


@broken("generator", check=_DTYPE)
class HoldsBfloat16Whatever(ReferenceGenerator):
    """Holds its weights in bfloat16, whatever the options say."""

    def make_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.options = self.options.model_copy(update={"dtype": "bfloat16"})
        return super().make_parameters(tensors)


# What they make of it


@broken("generator", check=_LOG_PROBS)
class TakesTheEmbeddingForTheHead(ReferenceGenerator):
    """Ties the head to the embedding where the model does not."""

    def rank_weights(self, rank: EngineRank) -> RankWeights:
        found = super().rank_weights(rank)
        return replace(found, head_VD=found.embed_VD)


@broken("generator", check=_LOG_PROBS)
class SwapsKeysAndValues(ReferenceGenerator):
    """Loads keys where values belong, and values where keys do."""

    def load_qkv(self, rank: EngineRank, name: str, kind: Projection, tensor: torch.Tensor) -> None:
        other: dict[str, Projection] = {"k_proj": "v_proj", "v_proj": "k_proj", "q_proj": "q_proj"}
        super().load_qkv(rank, name.replace(kind, other[kind]), other[kind], tensor)


@broken("generator", check=_LOG_PROBS)
class SwapsGateAndUp(ReferenceGenerator):
    """Loads the gate where up belongs, and up where the gate does."""

    def load_gate_up(self, rank: EngineRank, name: str, kind: str, tensor: torch.Tensor) -> None:
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}[kind]
        super().load_gate_up(rank, name.replace(kind, other), other, tensor)


@broken("generator", check=_LOG_PROBS)
class SwapsTheColumnsOfItsRanks(TwoRanks):
    """Loads into each rank the columns that the other one should have."""

    def load_columns(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        held = rank.parameters[name]
        held.copy_(tensor.narrow(1, (1 - rank.index) * held.shape[1], held.shape[1]))


@broken("generator", check=_WHOLE)
class LoadsTheFirstColumnsIntoEveryRank(TwoRanks):
    """Loads the first rank's columns into the last one too."""

    def load_columns(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        held = rank.parameters[name]
        held.copy_(tensor.narrow(1, 0, held.shape[1]))


class _Shadowing(Sink):
    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        super().bind(regions)
        self._views = [v.clone() if r.tensor == NORM else v for v, (_, r) in zip(self._views, regions, strict=True)]


@broken("generator", check=_LOG_PROBS)
class InstallsATensorBesideItsOwn(ReferenceGenerator):
    """Writes one tensor into a copy that it shows, and serves another."""

    def make_sink(self, rank: EngineRank) -> WeightSink:
        return _Shadowing(self, rank)


@broken("generator", check=_LOG_PROBS)
class ScoresWithTheFirstVersion(ReferenceGenerator):
    """Scores with the weights that it first scored with."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        kept = self.__dict__.setdefault("kept", [_copy(self.rank_weights(rank)) for rank in self.ranks])
        return completion_logprobs(self.config, kept, sequences)


def _copy(weights: RankWeights) -> RankWeights:
    layers = [type(layer)(**{name: held.clone() for name, held in vars(layer).items()}) for layer in weights.layers]
    return RankWeights(weights.embed_VD.clone(), layers, weights.norm_D.clone(), weights.head_VD.clone())


@broken("generator", check=_DERIVED)
class RefreshesWithTheEmbedding(ReferenceGenerator):
    """Makes what is derived anew only if the embedding has changed too."""

    def refresh(self, rank: EngineRank) -> None:
        seen: dict[int, torch.Tensor] = self.__dict__.setdefault("seen", {})
        embed_VD = rank.parameters[EMBED]
        if rank.index not in seen or not seen[rank.index].equal(embed_VD):
            super().refresh(rank)
        seen[rank.index] = embed_VD.clone()


@broken("generator", check=_DERIVED)
class LeavesWhatIsDerived(ReferenceGenerator):
    """Never makes anew what is derived from the weights of the files."""

    def refresh(self, rank: EngineRank) -> None:
        if not self.__dict__.setdefault("done", False):
            super().refresh(rank)
        self.done = rank.index == self.options.tp - 1


@broken("generator", check=_DERIVED)
class KeepsTheTiedHead(ReferenceGenerator):
    """Makes its head of the embedding of the files, and leaves it so."""

    def rank_weights(self, rank: EngineRank) -> RankWeights:
        found = super().rank_weights(rank)
        if not self.config.tied:
            return found
        heads: dict[int, torch.Tensor] = self.__dict__.setdefault("heads", {})
        return replace(found, head_VD=heads.setdefault(rank.index, found.embed_VD.clone()))


@broken("generator", check="contract.only_completions_are_scored")
class ScoresPromptsToo(ReferenceGenerator):
    """Scores the tokens of prompts as well."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        none_B = np.ones_like(sequences.prompt_lengths_B)
        return super().score(Sequences(sequences.tokens_BT, none_B, sequences.lengths_B, sequences.temperature))


@broken("generator", check="contract.scores_are_at_the_temperature_asked_for")
class ScoresAtNoHighTemperature(ReferenceGenerator):
    """Scores at temperature 1 where a higher one is asked for."""

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        low = min(sequences.temperature, 1.0)
        return super().score(Sequences(sequences.tokens_BT, sequences.prompt_lengths_B, sequences.lengths_B, low))
