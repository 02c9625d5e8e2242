"""The actors of a run and the session between them, made from the config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rlbridge.cluster.groups import GeneratorGroup, TrainerGroup
from rlbridge.cluster.nodes import check_nodes
from rlbridge.cluster.ray_cluster import Ask, cluster
from rlbridge.config import RunConfig
from rlbridge.env import place
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.options import RoleOptions
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext
from rlbridge.roles.transport import TransportOptions
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.session import SyncOptions, SyncSession


@dataclass
class Workers:
    """All ranks of the trainer, all engines, and what carries the weights between them."""

    trainer: TrainerGroup
    generator: GeneratorGroup
    session: SyncSession
    transport: str


@contextlib.contextmanager
def workers(config: RunConfig, transport: TransportOptions) -> Iterator[Workers]:
    """Start Ray and the actors, load the models, and end them all at the end.

    Raises:
        PluginError: a role's environment is not built, or is not equal to the driver.
        ResourceError: the cluster has less than the config asks for, a node of it lacks a role's environment, or the actors do
            not start in time.
    """
    trainers = place("trainer", config.trainer.backend, config.trainer.env)
    generators = place("generator", config.generator.backend, config.generator.env)
    asks = [
        Ask("trainer", config.trainer.workers, config.trainer.resources),
        Ask("generator", config.generator.workers, config.generator.resources),
    ]
    with cluster(asks, config.cluster.address, config.cluster.temp_dir) as own:
        env = _environment(own)
        if not own:
            check_nodes("trainer", trainers, config.trainer.resources)
            check_nodes("generator", generators, config.generator.resources)
        trainer = TrainerGroup(config.trainer, env, trainers)
        generator = GeneratorGroup(config.generator, env, generators)
        try:
            seconds = config.cluster.start_seconds
            generator.launch(_generator_context(config))
            trainer.start(_trainer_context(config), seconds, loopback=own)
            generator.finish(seconds)
            spec = TransportSpec(transport.backend, transport.model_dump(mode="json"))
            with contextlib.closing(SyncSession(trainer.parties, generator.parties, spec, _sync_options(config))) as session:
                yield Workers(trainer, generator, session, transport.backend)
        finally:
            trainer.end()
            generator.end()


def device_of(options: RoleOptions) -> str:
    """Where a role's tensors lie: on a GPU if it asks for one."""
    return "cuda" if options.resources.gpus > 0 else "cpu"


def _environment(own: bool) -> dict[str, str]:
    """Variables of every actor. A cluster of our own, on this machine, keeps its data plane on the loopback interface."""
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if own and not has_rdma_device():
        env |= {"UCX_NET_DEVICES": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return env


def _sync_options(config: RunConfig) -> SyncOptions:
    sync = config.sync
    return SyncOptions(
        publish=sync.publish,
        cast=sync.cast,
        deadline_seconds=sync.deadline_seconds,
        lease_seconds=sync.lease_seconds,
        setup_seconds=config.cluster.start_seconds,
        pause=sync.pause,
    )


def _trainer_context(config: RunConfig) -> TrainerContext:
    algorithm, optimizer = config.algorithm, config.optimizer
    return TrainerContext(
        rank=0,
        world_size=1,
        device=device_of(config.trainer),
        model_path=str(config.model.path.absolute()),
        seed=config.seed,
        rendezvous="",
        timeout_seconds=config.cluster.step_seconds,
        trust_remote_code=config.model.trust_remote_code,
        algorithm=AlgorithmOptions(algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef),
        optimizer=OptimizerOptions(
            optimizer.lr,
            optimizer.betas,
            optimizer.eps,
            optimizer.weight_decay,
            optimizer.grad_clip,
            optimizer.warmup_steps,
        ),
        options=config.trainer.model_dump(mode="json"),
    )


def _generator_context(config: RunConfig) -> GeneratorContext:
    return GeneratorContext(
        engine=0,
        engines=1,
        device=device_of(config.generator),
        model_path=str(config.model.path.absolute()),
        seed=config.seed,
        trust_remote_code=config.model.trust_remote_code,
        options=config.generator.model_dump(mode="json"),
    )
