"""From a run to its result: who was tested, over which wire, and what became of each check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlbridge.importing import distribution_version
from rlbridge.plugins import registry
from rlbridge.sync.report import SyncReport
from rlbridge_conformance.levels import Role
from rlbridge_conformance.report import BackendInfo, Result, Wire, look
from rlbridge_conformance.triple import REFERENCE

if TYPE_CHECKING:
    from rlbridge_conformance.run import Run


def result_of(run: Run) -> Result:
    """The result of a run that has ended."""
    return Result.of(
        run.settings.levels,
        run.results,
        look(),
        trainer=_backend(run, "trainer"),
        generator=_backend(run, "generator"),
        transport=_backend(run, "transport"),
        wire=_wire(run.reports),
    )


def _backend(run: Run, role: Role) -> BackendInfo:
    choice = run.triple.choice(role)
    if choice.name == REFERENCE:
        return BackendInfo(
            name=REFERENCE,
            distribution="rlbridge",
            version=distribution_version("rlbridge"),
            options=dict(choice.options),
            capabilities=sorted(run.triple.backend(role).capabilities),
            reference=role not in run.triple.tested,
        )
    row = next(row for row in registry().listing() if row.role == role and row.name == choice.name)
    return BackendInfo(
        name=choice.name,
        distribution=row.distribution,
        version=row.version,
        options=dict(choice.options),
        capabilities=list(row.capabilities),
        reference=role not in run.triple.tested,
    )


def _wire(reports: Iterable[SyncReport]) -> Wire:
    """Every wire that was seen, with how it is known."""
    seen = {(e.wire, e.known_from): None for report in reports for e in report.evidence if e.wire}
    wires = dict.fromkeys(wire for wire, _ in seen)
    return Wire(name=" + ".join(wires), evidence="; ".join(f"{wire}: {known}" for wire, known in seen))
