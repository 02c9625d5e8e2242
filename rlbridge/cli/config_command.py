"""`rlbridge config`: a config file as a run would see it, checked, and the schema of all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cyclopts import App

from rlbridge.config import check_config, json_schema, load_config, to_yaml

app = App(name="config", help="Show, check or describe config files.")


@app.command
def show(file: Path, *overrides: str) -> None:
    """Print the config with every key that was left to its default.

    Parameters
    ----------
    file
        The YAML file.
    overrides
        section.key=value, on top of the file.
    """
    sys.stdout.write(to_yaml(load_config(file, overrides)))


@app.command
def check(file: Path, *overrides: str) -> None:
    """Refuse a config that cannot run: wrong keys, backends that do not fit each other, files that are missing.

    Parameters
    ----------
    file
        The YAML file.
    overrides
        section.key=value, on top of the file.
    """
    for note in check_config(load_config(file, overrides)):
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(f"{file}: ok\n")


@app.command
def schema() -> None:
    """Print the JSON schema of config files, with the options of every backend that is importable here."""
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
