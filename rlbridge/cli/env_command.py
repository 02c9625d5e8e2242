"""`rlbridge env`: the environments that roles can run in: listed, built, checked, removed, locked."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from rlbridge.env import Found, State, compile_lock, found
from rlbridge.env import build as build_environment
from rlbridge.env import check as check_environment
from rlbridge.env import remove as remove_environment
from rlbridge.env.uv import Tell
from rlbridge.errors import PluginError
from rlbridge.plugins import registry

app = App(name="env", help="List, build, check, remove and lock the environments that roles can run in.")

_COLOURS = {State.BUILT: "green", State.UNFINISHED: "red", State.OUTDATED: "yellow", State.NO_LOCK: "red"}
_UNTOLD = (" + ", " - ", " ~ ", "Activate with")  # uv lists what it installed, a line each; nobody has to activate anything


@app.command(name="list")
def list_(*, json: bool = False) -> None:
    """List the environments that the installed plugins declare, and what is built.

    Parameters
    ----------
    json
        Print JSON: a list of objects.
    """
    rows = found()
    if json:
        sys.stdout.write(json_format.dumps([_plain(row) for row in rows], indent=2) + "\n")
    elif rows:
        Console().print(_table(rows))
    else:
        Console().print("no plugin declares an environment")


@app.command
def build(name: str) -> None:
    """Build an environment from its lock, unless it is built.

    uv's own variables say where packages come from: UV_DEFAULT_INDEX, UV_INDEX, UV_FIND_LINKS, UV_TORCH_BACKEND, UV_CACHE_DIR.

    Parameters
    ----------
    name
        The environment; `rlbridge env list` shows those there are.
    """
    environment, started = registry().environment(name), time.monotonic()
    with _progress() as tell:
        prefix = build_environment(environment, tell)
    Console(soft_wrap=True, highlight=False).print(f"{name} is built, {time.monotonic() - started:.0f} s: {prefix}")


@app.command
def check(name: str) -> int:
    """Check that an environment is whole and equal to what runs this; import its modules. Exit code: 0 it is, 1 it is not.

    Parameters
    ----------
    name
        The environment.
    """
    console = Console(soft_wrap=True, highlight=False)
    with _progress() as tell:
        tell(f"importing the modules of {name}", "")
        checked = check_environment(registry().environment(name))
    for problem in checked.problems:
        console.print(Text.assemble((f"{name}: ", "bold red"), problem))
    console.print(Text(checked.todo) if checked.problems else f"{name}: ok")
    return 1 if checked.problems else 0


@app.command
def remove(name: str | None = None, *, all_: bool = False) -> None:
    """Remove an environment, and what is outdated or unfinished of it.

    Parameters
    ----------
    name
        The environment.
    all_
        Remove all environments.
    """
    if (name is None) == (not all_):
        raise PluginError("which environment is to be removed?", todo="rlbridge env remove NAME, or rlbridge env remove --all")
    there = {row.name for row in found() if row.path}
    if name is not None and name not in there:
        registry().environment(name)  # raises where there is no such environment
    console = Console(soft_wrap=True, highlight=False)
    for each in sorted(there) if name is None else [name]:
        for path in remove_environment(each):
            console.print(f"removed {path}")


@app.command
def lock(name: str, *, output: Path | None = None, upgrade: bool = False) -> None:
    """Compile the lock of an environment from the requirements and overrides that its plugin declares.

    For those who write plugins. It is made for the Python that runs this.

    Parameters
    ----------
    name
        The environment.
    output
        Where to write it; by default where the plugin declares it to be.
    upgrade
        Take the newest versions; by default those of the present lock stay as far as they fit.
    """
    with _progress() as tell:
        path = compile_lock(registry().environment(name), tell, output, upgrade=upgrade)
    Console(soft_wrap=True, highlight=False).print(f"wrote {path}; its pins: {_count(path)}")


@contextlib.contextmanager
def _progress() -> Iterator[Tell]:
    """Phases with what uv says last, on a line that lives; plain lines where there is no terminal."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not console.is_terminal:

        def tell(phase: str, line: str) -> None:
            if not line.startswith(_UNTOLD):
                console.print(Text(f"  {line}" if line else phase))

        yield tell
        return
    with console.status("") as status:

        def show(phase: str, line: str) -> None:
            if not line:
                console.print(Text(phase))
            status.update(Text(f"{phase}: {line.strip()}" if line else phase, "dim"))

        yield show


def _plain(row: Found) -> dict[str, object]:
    return {
        "name": row.name,
        "state": row.state.value,
        "path": str(row.path) if row.path else None,
        "bytes": row.bytes,
        "built": row.built,
        "summary": row.summary,
        "backends": list(row.backends),
        "distribution": row.distribution,
    }


def _table(rows: list[Found]) -> Table:
    table = Table("name", "state", "size", "for", "summary", box=None, pad_edge=False)
    for column in table.columns[:3]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for row in rows:
        about = [Text(row.summary)]
        if row.path:
            about.append(Text(str(row.path), "dim"))
        state = Text(row.state.value, _COLOURS.get(row.state, ""))
        size = decimal(row.bytes) if row.path else ""
        table.add_row(row.name, state, size, ", ".join(row.backends), Text("\n").join(about))
    return table


def _count(lock: Path) -> int:
    return sum(1 for line in lock.read_text().splitlines() if "==" in line and not line.startswith((" ", "#")))
