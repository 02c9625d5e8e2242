"""`rlbridge env lock`: an environment's lock, compiled from what it declares."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlbridge.env.location import located
from rlbridge.env.lockfile import pins, published
from rlbridge.env.requirements import expanded
from rlbridge.env.uv import Tell, run_uv
from rlbridge.environment import Environment
from rlbridge.errors import BuildError


def compile_lock(environment: Environment, tell: Tell, output: Path | None = None, *, upgrade: bool = False) -> Path:
    """Compile the requirements of an environment under its overrides, and write its lock: to `output`, or beside the plugin.

    Versions that the lock has already stay, as far as they fit, unless `upgrade`. It is made for the driver's Python.

    Raises:
        BuildError: there is no such set of versions, or the lock cannot be written.
        PluginError: there is no uv.
    """
    target = output or located(environment.lock)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # Named without a folder, and uv started there: its annotations repeat what it is told.
        (place / "requirements").write_text("".join(f"{line}\n" for line in expanded(environment)))
        (place / "overrides").write_text("".join(f"{line}\n" for line in environment.overrides))
        if target.is_file() and not upgrade:
            (place / "lock").write_text(target.read_text())
        arguments = ["pip", "compile", "requirements", "--output-file", "lock", "--generate-hashes", "--no-header"]
        arguments += ["--no-emit-index-url", "--no-emit-find-links", "--quiet"]
        arguments += ["--overrides", "overrides"] if environment.overrides else []
        run_uv(arguments, f"locking {environment.name}", tell, cwd=place)
        text = published((place / "lock").read_text(), _header(environment), environment.resolved)
    if "rlbridge" in pins(text):
        raise BuildError(
            f"what the environment {environment.name!r} requires asks for rlbridge, which on an index is another project",
            todo="a package of theirs needs it: name another, or put that package into no_deps",
        )
    try:
        draft = target.with_name(f"{target.name}.draft")
        draft.write_text(text)
        draft.replace(target)
    except OSError as error:
        raise BuildError(f"the lock cannot be written: {error}", todo="--output FILE writes it elsewhere") from error
    return target


def _header(environment: Environment) -> str:
    return f"# Made by: rlbridge env lock {environment.name}\n"
