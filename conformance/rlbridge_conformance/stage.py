"""A stage: trainer ranks, engines and the session between them, for a check to play on."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from rlbridge.errors import RlbridgeError
from rlbridge.plugins import MODULES_VARIABLE
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences, decode, encode, pad_sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.options import RoleOptions
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext
from rlbridge.sync.messages import Box, Described, Held, Nothing, Read, State, TransportSpec, pack, result
from rlbridge.sync.report import SyncReport
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.hosts import GeneratorHost, TrainerHost
from rlbridge_conformance.levels import Role
from rlbridge_conformance.members import ActorMember, Member, ProcessMember
from rlbridge_conformance.models import VOCABULARY, Kind, make_model
from rlbridge_conformance.oracle import compare, read_checkpoint
from rlbridge_conformance.places import Places
from rlbridge_conformance.triple import Triple

Carrier = Literal["processes", "ray"]

_BOXES_A_CALL = 64


@dataclass(frozen=True)
class Scene:
    """What a stage consists of. Stages of equal scenes are the same stage, as long as nothing has gone wrong on it.

    Attributes:
        ranks: Trainer ranks.
        engines: Engines.
        model: Which of the suite's models all of them load.
        bulk_mib: Size of the tensor that makes a transfer long; see `make_model`.
        trainer, generator: Options; the user's come before them.
        transport: Options; they come before the user's, since a check that asks for a wire is about that wire.
        lr: Learning rate of the training between syncs.
    """

    ranks: int = 1
    engines: int = 1
    model: Kind = "tied"
    bulk_mib: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    generator: Mapping[str, Any] = field(default_factory=dict)
    transport: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.02

    def key(self) -> str:
        """Equal for equal scenes."""
        return repr(self)


@dataclass(frozen=True)
class Protocol:
    """Other classes in the place of the core's, as "module:Class": for backends that are broken on purpose."""

    publisher: str = ""
    engine: str = ""


class Stage:
    """The parties of a scene, set up, with a session that is not yet attached.

    Args:
        triple: The backends.
        scene: How many of them, with what.
        carrier: What the parties run in.
        directory: A directory of its own.
        places: Where the processes of each role run.
        protocol: For backends that are broken on purpose.
        prepare: By role, what is done to a plain process before anything else.
    """

    def __init__(
        self,
        triple: Triple,
        scene: Scene,
        carrier: Carrier,
        directory: Path,
        places: Places,
        protocol: Protocol = Protocol(),
        prepare: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self.triple, self.scene, self.carrier, self.directory = triple, scene, carrier, directory
        self.version = 0
        self.reports: list[SyncReport] = []
        self._places, self._protocol, self._prepare = places, protocol, dict(prepare or {})
        self._numbers = itertools.count(1)
        self._steps = itertools.count(1)
        self._options = {
            "trainer": triple.trainer.with_options({**scene.trainer, "workers": scene.ranks}).options,
            "generator": triple.generator.with_options(
                {**triple.claims("generator").options, **scene.generator, "workers": scene.engines}
            ).options,
            "transport": {**triple.transport.options, **scene.transport},
        }
        self.model = make_model(directory / "model", scene.model, bulk_mib=scene.bulk_mib)
        self._cast: list[Member] = []
        try:
            self.trainers = [self._new_trainer(rank) for rank in range(scene.ranks)]
            self.engines = [self._new_engine(index) for index in range(scene.engines)]
            self._setup(self.trainers, self.engines)
            self.session = self.session_with()
        except BaseException:
            self.close()
            raise

    # What a run does

    def sync(self) -> SyncReport:
        """Bring the trainers' weights to the engines, as the next version."""
        self.version += 1
        report = self.session.sync(self.version)
        self.reports.append(report)
        return report

    def train(self, steps: int = 1) -> dict[str, float]:
        """Optimizer steps on made-up sequences, large enough to move every log-prob."""
        metrics: dict[str, float] = {}
        for _ in range(steps):
            metrics = self.train_on(self.batch(next(self._steps)))[0]
        return metrics

    def train_on(self, batch: Batch) -> list[dict[str, float]]:
        """An optimizer step on a global batch; the metrics of each rank."""
        shards = [(encode(batch.shard(rank, len(self.trainers))),) for rank in range(len(self.trainers))]
        return self._on_all(self.trainers, "train_step", dict[str, float], shards)

    def save(self) -> Path:
        """The trainers' weights as a new Hugging Face directory."""
        path = self.directory / f"saved-{next(self._numbers)}"
        self._on_all(self.trainers, "save", None, [(str(path),)] * len(self.trainers))
        return path

    def trainer_scores(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] under the trainers' weights."""
        packed = encode(sequences)
        return decode(self._on_all(self.trainers, "score", bytes, [(packed,)] * len(self.trainers))[0], np.ndarray)

    def engine_scores(self, sequences: Sequences, engine: int = 0) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] under what an engine serves."""
        return decode(self.engines[engine].ask("score", bytes, encode(sequences)), np.ndarray)

    def generate(self, prompts: list[list[int]], engine: int = 0, **sampling: Any) -> list[Completion]:
        """Completions of an engine, greedy unless `sampling` says otherwise."""
        settings = Sampling(**{"max_tokens": 12, "temperature": 0.0, **sampling})
        found: list[Completion] = self.engines[engine].ask("generate", list[Completion], prompts, encode(settings))
        return found

    # What only a suite does

    def saved(self) -> dict[str, torch.Tensor]:
        """The oracle: what `save` writes, read by the suite."""
        return read_checkpoint(self.save())

    def served(self, engine: int = 0) -> list[list[Box]]:
        """Every box that an engine serves, for each of its ranks."""
        found: list[list[Box]] = []
        first = 0
        while True:
            replies = self._call(self.engines[engine], "read", Read(first, _BOXES_A_CALL), Held)
            found = found or [[] for _ in replies]
            for boxes, reply in zip(found, replies, strict=True):
                boxes.extend(reply.boxes)
            first += _BOXES_A_CALL
            if first >= max(reply.total for reply in replies):
                return found

    def holds(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Hold every engine to the saved tensors.

        Raises:
            Mismatch: one serves something else.
        """
        for index, engine in enumerate(self.engines):
            compare(saved, engine.name, self.served(index))

    def scramble(self) -> None:
        """Fill every engine's parameters with values that are no weights: they are dirty then."""
        for engine in self.engines:
            self._call(engine, "scramble", Nothing(), Nothing)

    def state(self, engine: int = 0) -> State:
        """What an engine says of itself."""
        found: State = self._call(self.engines[engine], "state", Nothing(), State)[0]
        return found

    def layouts(self) -> list[Described]:
        """What each trainer rank publishes."""
        futures = [trainer.party.call("layout", pack(Nothing())) for trainer in self.trainers]  # it may be collective
        return [result(future.result(60)[0], Described) for future in futures]

    @contextlib.contextmanager
    def another_session(self, **options: Any) -> Iterator[None]:
        """`session` is another one, for as long as the context lasts: parties take part in one at a time."""
        usual, self.session = self.session, self.session_with(**options)
        usual.close()
        try:
            yield
        finally:
            self.session.close()
            self.session = usual

    @contextlib.contextmanager
    def syncing(self, **options: Any) -> Iterator[None]:
        """The syncs within have these of the session's options; `publish` counts from the next epoch on."""
        usual, self.session.options = self.session.options, self.session_with(**options).options
        try:
            yield
        finally:
            self.session.options = usual

    def session_with(self, transport: Mapping[str, Any] = {}, **options: Any) -> SyncSession:
        """Another session between the same parties, with other options of the transport's, and its own."""
        settings = {"deadline_seconds": 30.0, "setup_seconds": 60.0, **options}
        validated = self.triple.validated("transport", {**self._options["transport"], **transport})
        spec = TransportSpec(self.triple.transport.name, validated.model_dump(mode="json"))
        parties = [m.party for m in self.trainers], [m.party for m in self.engines]
        return SyncSession(*parties, spec, SyncOptions(**settings))

    def fresh_text(self, path: Path, prompts: list[list[int]]) -> list[list[int]]:
        """The greedy tokens of an engine that has just loaded a saved directory, and takes part in nothing.

        It is a plain process whatever carries the stage: that is sooner there.
        """
        engine = self._member("generator", "generator[0]", "processes")
        self._finish(engine, self._begin_engine(engine, 0, path))
        try:
            found = engine.ask("generate", list[Completion], prompts, encode(Sampling(max_tokens=12, temperature=0.0)))
        finally:
            engine.end()
            self._cast.remove(engine)
        return [completion.token_ids for completion in found]

    @contextlib.contextmanager
    def lone_trainer(self, path: Path) -> Iterator[Member]:
        """A trainer of one rank that loads a model directory, and takes part in nothing."""
        trainer = self._new_trainer(0)
        try:
            self._finish(trainer, self._begin_trainer(trainer, 0, f"tcp://127.0.0.1:{_free_port()}", path, ranks=1))
            yield trainer
        finally:
            trainer.end()
            self._cast.remove(trainer)

    def on_trainers(self, method: str, path: str) -> None:
        """`save_state` or `load_state` on every rank."""
        self._on_all(self.trainers, method, None, [(path,)] * len(self.trainers))

    def replace(self, name: str) -> Member:
        """A new process in the place of the one of that name, which is ended. The next sync begins a new epoch."""
        for members, make in ((self.trainers, self._new_trainer), (self.engines, self._new_engine)):
            for index, old in enumerate(members):
                if old.name != name:
                    continue
                old.end()
                members[index] = make(index)
                trainers = [members[index]] if members is self.trainers else []
                self._setup(trainers, [] if trainers else [members[index]], first=index)
                self.session.replace(members[index].party)
                return members[index]
        raise KeyError(name)

    def member(self, name: str) -> Member:
        """The member of that name."""
        return next(m for m in (*self.trainers, *self.engines) if m.name == name)

    def close(self) -> None:
        """End every process."""
        if hasattr(self, "session"):
            self.session.options = SyncOptions(late_seconds=0.5)
            self.session.close()
        for member in self._cast:
            member.end()
        self._cast = []

    def sequences(self, seed: int = 0, *, rows: int = 4, temperature: float = 1.0) -> Sequences:
        """Made-up prompts and completions of unequal lengths."""
        draw = np.random.default_rng(seed)
        prompts = [draw.integers(2, VOCABULARY, size=3 + i % 4).tolist() for i in range(rows)]
        completions = [draw.integers(2, VOCABULARY, size=5 + (3 * i) % 7).tolist() for i in range(rows)]
        return pad_sequences(prompts, completions, temperature=temperature)

    def batch(self, step: int, *, rows: int = 0) -> Batch:
        """A global batch of made-up sequences: four rows a rank, or `rows`."""
        sequences = self.sequences(step, rows=rows or 4 * len(self.trainers))
        mask_BT = sequences.completion_mask_BT()
        draw = np.random.default_rng(step)
        return Batch(
            sequences,
            self.trainer_scores(sequences),
            draw.choice([-1.0, 1.0], size=len(sequences.lengths_B)).astype(np.float32),
            np.where(mask_BT, self.version, -1).astype(np.int32),
            int(mask_BT.sum()),
            step,
        )

    def _call(self, member: Member, method: str, message: object, kind: type[Any]) -> list[Any]:
        packed = pack(message)
        payload = msgspec.msgpack.encode([packed]) if member in self.engines else packed
        return [result(reply, kind) for reply in member.party.call(method, payload).result(60)]

    def _on_all(self, members: Sequence[Member], method: str, kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        futures = [member.begin(method, *given) for member, given in zip(members, arguments, strict=True)]
        return [member.answer(future, kind, method) for member, future in zip(members, futures, strict=True)]

    def _new_trainer(self, rank: int) -> Member:
        return self._member("trainer", f"trainer[{rank}]")

    def _new_engine(self, index: int) -> Member:
        return self._member("generator", f"generator[{index}]")

    def _member(self, role: Role, name: str, carrier: Carrier | None = None) -> Member:
        kind: Any = TrainerHost if role == "trainer" else GeneratorHost
        backend = self.triple.trainer.name if role == "trainer" else self.triple.generator.name
        protocol = self._protocol.publisher if role == "trainer" else self._protocol.engine
        member: Member
        if (carrier or self.carrier) == "processes":
            prepare = self._prepare.get(name) or self._prepare.get(role)
            nursery = self._places.nursery(self._places.of(self.triple, role))
            member = ProcessMember(kind, name, backend, protocol, environment(), nursery, prepare)
        else:
            member = ActorMember(kind, name, backend, protocol, self._actor_options(role))
        self._cast.append(member)
        return member

    def _actor_options(self, role: Role) -> dict[str, Any]:
        resources = self.triple.validated(role, self._options[role]).resources
        env = self._places.of(self.triple, role).runtime_env(environment())
        made: dict[str, Any] = {"num_cpus": 0.01, "num_gpus": resources.gpus, "runtime_env": env}
        return made | ({"accelerator_type": resources.accelerator} if resources.accelerator else {})

    def _setup(self, trainers: Sequence[Member], engines: Sequence[Member], first: int = 0) -> None:
        rendezvous = f"tcp://127.0.0.1:{_free_port()}"
        begun = [(m, self._begin_trainer(m, first + i, rendezvous)) for i, m in enumerate(trainers)]
        begun += [(m, self._begin_engine(m, first + i, self.model)) for i, m in enumerate(engines)]
        for member, future in begun:
            self._finish(member, future)

    def _begin_trainer(self, member: Member, rank: int, rendezvous: str, path: Path | None = None, ranks: int = 0) -> Any:
        options = self.triple.validated("trainer", self._options["trainer"])
        context = TrainerContext(
            rank=rank,
            world_size=ranks or self.scene.ranks,
            device=_device(options),
            model_path=str(path or self.model),
            seed=0,
            rendezvous=rendezvous,
            timeout_seconds=20.0,
            trust_remote_code=False,
            algorithm=AlgorithmOptions(0.2, 0.2, 0.0),
            optimizer=OptimizerOptions(self.scene.lr, (0.9, 0.99), 1e-8, 0.0, 0.0, 0),
            options=options.model_dump(mode="json"),
        )
        return member.begin("setup", encode(context))

    def _begin_engine(self, member: Member, index: int, path: Path) -> Any:
        options = self.triple.validated("generator", self._options["generator"])
        context = GeneratorContext(
            engine=index,
            engines=self.scene.engines,
            device=_device(options),
            model_path=str(path),
            seed=0,
            trust_remote_code=False,
            options=options.model_dump(mode="json"),
        )
        return member.begin("setup", encode(context))

    @staticmethod
    def _finish(member: Member, future: Any) -> None:
        try:
            member.answer(future, Nothing, "setup", seconds=180.0)
        except RlbridgeError as error:
            raise error.at(peer=member.name) from error


def environment() -> dict[str, str]:
    """Variables of every process of a stage."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        MODULES_VARIABLE: os.environ.get(MODULES_VARIABLE, ""),
    }
    if not has_rdma_device():
        env |= {"UCX_NET_DEVICES": os.environ.get("UCX_NET_DEVICES", "lo"), "GLOO_SOCKET_IFNAME": "lo"}
    return env


def _device(options: RoleOptions) -> str:
    return "cuda" if options.resources.gpus > 0 else "cpu"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
