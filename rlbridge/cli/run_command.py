"""`rlbridge run`: a config file to its end, or a run that goes on."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from rlbridge.config import RunConfig, check_config, load_config, to_yaml
from rlbridge.errors import CheckpointError, ConfigError
from rlbridge.observe.files import FileObserver
from rlbridge.observe.progress import ProgressObserver
from rlbridge.plugins import registry
from rlbridge.rl.checkpoints import latest_checkpoint, read_state
from rlbridge.rl.run import Run, check_name, open_run


def run(
    config: Path | None = None,
    /,
    *overrides: str,
    resume: Annotated[Path | None, Parameter(help="The directory of a run to go on with, instead of a config file.")] = None,
) -> int:
    """Run a config file to its end.

    Args:
        config: A YAML file.
        overrides: Dotted settings that replace the file's, for example trainer.workers=2.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.path.insert(0, str(Path.cwd()))  # a user's reward functions lie where she stands
    console = Console(highlight=False)
    started = time.monotonic()
    if resume is not None:
        settings = ([str(config)] if config is not None else []) + list(overrides)
        loaded, directory, step = _resumed(resume, settings)
    elif config is not None:
        loaded, directory, step = load_config(config, overrides), None, 0
        check_name(loaded.runs_dir, loaded.name)
    else:
        raise ConfigError("what is to be run?", todo="rlbridge run FILE.yaml, or rlbridge run --resume RUN_DIRECTORY")
    for note in check_config(loaded):
        console.print(note)
    from rlbridge.rl.start import execute, prepare  # imports ray and transformers: not for a config that cannot run

    def begin() -> Run:
        """Everything is in place: the run gets its directory."""
        place = directory or open_run(loaded.runs_dir, loaded.name, config.stem if config else "run")
        (place / "config.yaml").write_text(to_yaml(loaded))
        return Run(place.name, place, loaded, loaded.algorithm.steps, step, started)

    prepared = prepare(loaded, console.print)
    console.print(
        f"starting {loaded.trainer.workers} x trainer {loaded.trainer.backend}, "
        f"{loaded.generator.workers} x generator {loaded.generator.backend}, transport {prepared.transport.backend}"
    )
    observers = [FileObserver(), ProgressObserver()]
    for observer in observers:
        registry().manager.register(observer)
    try:
        execute(loaded, prepared, begin)
    finally:
        for observer in observers:
            registry().manager.unregister(observer)
    return 0


def _resumed(directory: Path, overrides: list[str]) -> tuple[RunConfig, Path, int]:
    """The config of a run that is to go on, its directory, and the step that it has reached."""
    file = directory / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{directory} is no run: it has no config.yaml", todo="--resume takes a directory under runs/")
    checkpoint = latest_checkpoint(directory / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{directory} has no checkpoint to go on from",
            todo="start it anew with rlbridge run; checkpoint.every=N writes one every N steps",
        )
    return load_config(file, overrides), directory, int(read_state(checkpoint)["step"])
