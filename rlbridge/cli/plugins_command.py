"""`rlbridge plugins`: every backend that is installed, and every plugin that is broken."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlbridge.env import State, state_of
from rlbridge.plugins import Broken, Row, registry


def plugins(*, json: bool = False) -> None:
    """List the backends that are installed, and the plugins that are broken.

    Parameters
    ----------
    json
        Print JSON: `backends` and `broken`, each a list of objects.
    """
    found = registry()
    if json:
        _print_json(found.listing(), found.broken)
    else:
        _print_tables(found.listing(), found.broken)


def _print_json(rows: list[Row], broken: list[Broken]) -> None:
    content = {
        "backends": [dataclasses.asdict(row) for row in rows],
        "broken": [dataclasses.asdict(plugin) for plugin in broken],
    }
    sys.stdout.write(json_format.dumps(content, indent=2) + "\n")


def _print_tables(rows: list[Row], broken: list[Broken]) -> None:
    console = Console()
    table = Table("role", "name", "version", "plugin", "state", "summary", box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        state = Text("ready", "green") if row.importable else Text("missing", "yellow")
        table.add_row(row.role, Text(row.name), row.version, Text(row.plugin), state, _about(row))
    console.print(table)
    for plugin in broken:
        console.print(Text.assemble(("broken:", "bold red"), f" {plugin}"), soft_wrap=True)


def _about(row: Row) -> Text:
    lines = [Text(row.summary)]
    if not row.importable:
        lines.append(Text(row.reason, "yellow"))
        lines += [Text(_environment(name), "yellow") for name in row.environments]
    if row.tested:
        lines.append(Text(f"tested with {' '.join(row.tested)}", "dim"))
    if row.capabilities:
        lines.append(Text(" ".join(row.capabilities), "dim"))
    return Text("\n").join(lines)


def _environment(name: str) -> str:
    """What has a backend that is missing here."""
    known = {environment.name: environment for environment in registry().environments()}
    if name not in known:
        return f"the environment {name} would have it, and no plugin brings that"
    state = state_of(known[name])
    return f"the environment {name} has it: " + ("built" if state is State.BUILT else f"{state}, rlbridge env build {name}")
