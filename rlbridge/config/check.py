"""What can be known to be wrong with a config before anything starts: names, pairs that cannot work together, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from packaging.requirements import Requirement

from rlbridge.backend import Backend, Capability
from rlbridge.config.sections import AUTO_TRANSPORT, RunConfig
from rlbridge.env import absent, place, version_at
from rlbridge.errors import ConfigError, RlbridgeError
from rlbridge.importing import install_hint, is_target
from rlbridge.plugins import Role, registry
from rlbridge.roles.options import RoleOptions

_PLACED: tuple[Role, ...] = ("trainer", "generator")


def check_config(config: RunConfig) -> list[str]:
    """Refuse what cannot run. Returns notes for a person: what was defaulted, and what is going to be done on the way.

    Raises:
        ConfigError: lists everything that was found.
    """
    problems = [*_unusable(config)]
    if not problems:  # capabilities are those of backends that are known
        problems += [*_untested_versions(config), *incompatibilities(config, config.transport.backend)]
    problems += [*_uneven_batch(config), *_missing_files(config)]
    if problems:
        raise ConfigError("\n  ".join(["this config cannot run:", *problems]))
    return [*_notes(config)]


def incompatibilities(config: RunConfig, transport: str) -> list[str]:
    """Why the config's trainer and generator cannot work with each other over `transport`; "auto" leaves the transport out."""
    trainer = registry().backend("trainer", config.trainer.backend)
    generator = registry().backend("generator", config.generator.backend)
    problems = [*_unequal_dtypes(config), *_beyond_capabilities(config, trainer, generator)]
    if transport != AUTO_TRANSPORT:
        problems += _not_in_environments(config, registry().backend("transport", transport))
        problems += _wrong_transport(config, generator, registry().backend("transport", transport))
    return problems


def model_problem(path: Path) -> str | None:
    """Why the directory holds no Hugging Face model, or None if it holds one."""
    if not path.is_dir():
        return f"there is no directory {path}"
    if not (path / "config.json").is_file():
        return f"there is no model in {path}: it has no config.json"
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return f"the model in {path} has no weights: no *.safetensors, no *.bin"
    return None


def _unusable(config: RunConfig) -> Iterator[str]:
    """Backends that are unknown or not installed."""
    chosen = {"trainer.backend": config.trainer.backend, "generator.backend": config.generator.backend}
    if config.transport.backend != AUTO_TRANSPORT:
        chosen["transport.backend"] = config.transport.backend
    if not is_target(config.reward.fn):
        chosen["reward.fn"] = config.reward.fn
    if config.model.make is not None:
        chosen["model.make"] = config.model.make
    for key, name in chosen.items():
        role = cast(Role, key.partition(".")[0])
        try:
            if role in _PLACED:
                place(role, name, getattr(config, role).env)
                continue
            reason = registry().missing(role, name)
        except RlbridgeError as error:
            yield f"{key}: {error}".replace("\n", "\n  ")
        else:
            if reason:
                hint = install_hint(registry().backend(role, name).extra)
                yield "; ".join(filter(None, [f"{key}: {name!r} is not installed: {reason}", hint]))


def _untested_versions(config: RunConfig) -> Iterator[str]:
    """Frameworks whose version is none that the backend has been tested with."""
    for role in _PLACED:
        options = getattr(config, role)
        backend, where = registry().backend(role, options.backend), place(role, options.backend, options.env)
        for requirement in map(Requirement, backend.tested):
            version = version_at(where, requirement.name)
            if version and not requirement.specifier.contains(version, prereleases=True):
                there = f"in the environment {where.name!r}" if where.name else "here"
                yield (
                    f"{role}.backend {backend.name!r} is tested with {requirement}, and {version} is installed {there}; "
                    f"pip install '{requirement}', or a newer rlbridge"
                )


def _not_in_environments(config: RunConfig, transport: Backend) -> Iterator[str]:
    for role in _PLACED:
        options = getattr(config, role)
        where = place(role, options.backend, options.env)
        if module := absent(where, transport):
            yield (
                f"transport.backend {transport.name!r} cannot be used in the environment {where.name!r} of the {role}: "
                f"it has no module {module!r}"
            )


def _wrong_transport(config: RunConfig, generator: Backend, transport: Backend) -> Iterator[str]:
    if Capability.NEEDS_RAY_ACTORS in transport.capabilities and Capability.RANKS_ARE_ACTORS not in generator.capabilities:
        yield (
            f"transport.backend {transport.name!r} moves Ray objects, and the ranks of generator.backend {generator.name!r} "
            "are no Ray actors"
        )
    if config.transport.require == "rdma" and Capability.RDMA not in transport.capabilities:
        yield f"transport.require rdma: transport.backend {transport.name!r} does not use RDMA"
    if config.sync.publish == "barrier" and Capability.LIVE_STORAGE not in transport.capabilities:
        yield f"sync.publish barrier: transport.backend {transport.name!r} cannot read a trainer's parameters in place"


def _beyond_capabilities(config: RunConfig, trainer: Backend, generator: Backend) -> Iterator[str]:
    if config.trainer.workers > 1 and Capability.MULTI_RANK not in trainer.capabilities:
        yield f"trainer.workers is {config.trainer.workers}, and trainer.backend {trainer.name!r} runs on one"
    if config.sync.publish == "barrier" and Capability.LIVE_STORAGE not in trainer.capabilities:
        yield f"sync.publish barrier: the parameters of trainer.backend {trainer.name!r} cannot be read in place"
    needed = {"keep": Capability.PAUSE_KEEP, "abort": Capability.PAUSE_ABORT}.get(config.sync.pause)
    if needed is not None and needed not in generator.capabilities:
        yield f"sync.pause {config.sync.pause}: generator.backend {generator.name!r} can only wait for running requests"
    for role, options, backend in (("trainer", config.trainer, trainer), ("generator", config.generator, generator)):
        if _on_cuda(options) and Capability.CUDA not in backend.capabilities:
            yield f"{role}.resources.gpus is {options.resources.gpus:g}, and {role}.backend {backend.name!r} does not use CUDA"


def _unequal_dtypes(config: RunConfig) -> Iterator[str]:
    trainer, generator = config.trainer.dtype, config.generator.dtype
    if trainer == generator:
        return
    if config.sync.cast == "refuse":
        yield f"sync.cast refuse: trainer.dtype is {trainer}, and generator.dtype {generator}"
    if config.sync.publish == "barrier":
        yield f"sync.publish barrier reads bytes as they are: trainer.dtype is {trainer}, and generator.dtype {generator}"


def _uneven_batch(config: RunConfig) -> Iterator[str]:
    prompts, samples = config.algorithm.prompts_per_step, config.algorithm.samples_per_prompt
    if prompts * samples % config.trainer.workers:
        yield (
            f"algorithm.prompts_per_step {prompts} x algorithm.samples_per_prompt {samples} = {prompts * samples} sequences "
            f"a step, which trainer.workers {config.trainer.workers} cannot share evenly"
        )


def _missing_files(config: RunConfig) -> Iterator[str]:
    problem = model_problem(config.model.path)
    made = problem is not None and config.model.make is not None
    if problem and not made:
        yield f"model.path: {problem}"
    for key, path in (("data.path", config.data.path), ("data.held_out_path", config.data.held_out_path)):
        if path is None or path.exists() or (made and path.parent == config.model.path):
            continue
        yield f"{key}: there is no {path}"


def _notes(config: RunConfig) -> Iterator[str]:
    if config.model.make is not None:
        problem = model_problem(config.model.path)
        yield (
            f"model.make: {problem}, so {config.model.make} makes one"
            if problem
            else "model.make: not needed, there is a model"
        )
    for role in _PLACED:
        options = getattr(config, role)
        if note := place(role, options.backend, options.env).note:
            yield note
    if config.data.held_out_path is None and config.data.held_out:
        yield f"data.held_out: {config.data.held_out} prompts of {config.data.path} are kept for evaluation"
    if config.transport.backend == AUTO_TRANSPORT:
        yield "transport.backend: auto takes the first that works here, when the run starts"
    if config.trainer.dtype != config.generator.dtype:
        yield f"sync.cast: weights are rounded from {config.trainer.dtype} to {config.generator.dtype} before they travel"
    if config.model.trust_remote_code:
        yield "model.trust_remote_code: the model directory's own Python is going to run"


def _on_cuda(options: RoleOptions) -> bool:
    return options.resources.gpus > 0
