"""`rlbridge doctor`: what of this host would keep a run from being fast or right, found before there is a run."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlbridge.backend import Backend, Capability
from rlbridge.errors import ConfigError
from rlbridge.plugins import registry
from rlbridge.rdma.doctor import Finding, findings

OPTIONS = {"require": "rdma"}
"""What a transport is tried with."""

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(*, rdma: Annotated[bool, Parameter(negative="", show_default=False)] = False, json: bool = False) -> int:
    """Say why RDMA would or would not be used on this host, and what to do. Exit code: 0 it is used, 1 it is not.

    It looks at devices, ports, limits and variables as this process has them: run it where the actors run, on each host. Then
    every transport that can use RDMA moves some bytes over it, if it can.

    Parameters
    ----------
    rdma
        Look at RDMA; so far there is nothing else to look at.
    json
        Print JSON: `rdma`, whether it is used, and `findings`, a list of objects.
    """
    if not rdma:
        raise ConfigError("what is to be looked at?", todo="rlbridge doctor --rdma")
    found = findings()
    if all(finding.about != "device" for finding in found):
        found += [_tried(backend) for backend in _with_rdma()]
    used = all(finding.verdict != "problem" for finding in found)
    if json:
        content = {"rdma": used, "findings": [dataclasses.asdict(finding) for finding in found]}
        sys.stdout.write(json_format.dumps(content, indent=2) + "\n")
    else:
        _print(found, used)
    return 0 if used else 1


def _with_rdma() -> list[Backend]:
    """Transports that use RDMA, and can be tried without Ray."""
    names = [row.name for row in registry().listing() if row.role == "transport"]
    backends = [registry().backend("transport", name) for name in names]
    return [b for b in backends if Capability.RDMA in b.capabilities and Capability.NEEDS_RAY_ACTORS not in b.capabilities]


def _tried(backend: Backend) -> Finding:
    about = f"transport {backend.name}"
    if reason := registry().missing("transport", backend.name):
        return Finding(about, "problem", f"it is not installed: {reason}", f"pip install 'rlbridge[{backend.extra}]'")
    from rlbridge.sync.trial import trial

    found = trial(backend.name, OPTIONS)
    if found.error:
        return Finding(about, "problem", f"no bytes over RDMA: {found.error.splitlines()[0]}", "see the findings above")
    wires = " + ".join(said.wire for said in found.evidence)
    counts = f"; the ports have counted {found.ports.received} bytes" if found.ports else ""
    rate = found.nbytes / found.seconds / 1e6
    return Finding(about, "ok", f"{found.nbytes} bytes over {wires}, the right ones, {rate:.0f} MB/s{counts}")


def _print(found: list[Finding], used: bool) -> None:
    console = Console()
    table = Table("", "looked at", "seen", box=None, pad_edge=False)
    for finding in found:
        seen = Text(finding.said)
        if finding.todo:
            seen.append(f"\n{finding.todo}", "dim")
        table.add_row(Text(finding.verdict, _STYLES[finding.verdict]), finding.about, seen)
    console.print(table)
    console.print("RDMA is used on this host" if used else "RDMA is not used on this host", style="bold")
