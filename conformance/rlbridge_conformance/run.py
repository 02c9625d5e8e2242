"""One run of the suite: the backends, the stages that are kept between checks, the state of every check."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from rlbridge.config.load import apply_override
from rlbridge.errors import ConfigError, RlbridgeError
from rlbridge.plugins import MODULES_VARIABLE, registry
from rlbridge.sync.report import SyncReport
from rlbridge_conformance.checks import Check, Mismatch, in_full
from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.levels import LEVELS, ROLES, Level, Role
from rlbridge_conformance.places import Places
from rlbridge_conformance.report import Check as Ended
from rlbridge_conformance.report import Result, State, verdict_line, write_report
from rlbridge_conformance.requirements import check_claims
from rlbridge_conformance.results import result_of
from rlbridge_conformance.stage import Carrier, Protocol, Scene, Stage
from rlbridge_conformance.triple import REFERENCE, Choice, Triple, requirements_by_role

_REFERENCE_MODULE = "rlbridge_conformance.reference"
_KEPT_STAGES = 2


class NotRun(pytest.skip.Exception):  # type: ignore[name-defined,misc]
    """What is claimed cannot be run on this machine."""


def not_run(reason: str) -> None:
    """End a check that this machine has not the means for.

    Raises:
        NotRun: always.
    """
    raise NotRun(f"not run: {reason}")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    triple: Triple
    levels: tuple[Level, ...] = LEVELS[:2]
    report: Path | None = None
    carrier: str = "auto"
    protocol: Protocol = field(default_factory=Protocol)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings out of the texts of a command line.

    Raises:
        ConfigError: a level, a role or an option that does not exist.
    """
    modules = [os.environ.get(MODULES_VARIABLE, ""), _REFERENCE_MODULE, *given["plugin"]]
    os.environ[MODULES_VARIABLE] = ",".join(dict.fromkeys(m for text in modules for m in text.split(",") if m))
    registry.cache_clear()
    for broken in registry().broken:
        if broken.name in given["plugin"]:
            hint = "name the module, without .py" if broken.name.endswith(".py") else "is it on the path? does it import?"
            raise ConfigError(f"the plugin {broken.name} cannot be used: {broken.reason}", todo=hint)
    tested = frozenset(role for role in ROLES if given[role])
    if not tested:
        raise ConfigError(
            "no backend is named", todo="name one: --rlbridge-transport=mine, or rlbridge conform --transport mine"
        )
    options = _options(given["set"], tested)
    choices = {role: Choice(given[role] or REFERENCE, options[role]) for role in ROLES}
    first, last = given["from"] or LEVELS[0], given["level"] or "sync"
    for level in (first, last):
        if level not in LEVELS:
            raise ConfigError(f"there is no level {level!r}", todo=f"levels: {', '.join(LEVELS)}")
    if LEVELS.index(first) > LEVELS.index(last):
        raise ConfigError(f"the level {first} comes after {last}", todo=f"ask for {first} as the last level too, or for less")
    if given["report"] and Path(given["report"]).is_file():
        raise ConfigError(f"{given['report']} is a file", todo="the report is a directory")
    protocol = dict(text.split("=", 1) for text in filter(None, given["protocol"].split(",")))
    return Settings(
        Triple(**choices, tested=tested, requirements=requirements_by_role(given["requirements"])),
        LEVELS[LEVELS.index(first) : LEVELS.index(last) + 1],
        Path(given["report"]) if given["report"] else None,
        given["carrier"] or "auto",
        Protocol(**protocol),
    )


def _options(texts: list[str], tested: frozenset[Role]) -> dict[Role, dict[str, Any]]:
    found: dict[Role, dict[str, Any]] = {role: {} for role in ROLES}
    for text in texts:
        role = text.partition(".")[0]
        if role not in ROLES:
            raise ConfigError(f"{text!r} sets no option of a backend", todo="write it as transport.wire=tcp")
        if role not in tested:
            raise ConfigError(f"{text!r} is an option of a {role}, and none is named", todo=f"name one with --{role}")
        apply_override(cast("dict[str, Any]", found), text)
    return found


class Run:
    """The checks of one pytest session.

    Attributes:
        results: The state of each check that has ended.
        reports: What the syncs over the tested transport have reported.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.triple = settings.triple
        self.results: list[Ended] = []
        self._stages: dict[str, Stage] = {}
        self.reports: list[SyncReport] = []
        self._result: Result | None = None
        self._remarks: Stages | None = None
        self._made = 0
        self._on_ray: contextlib.ExitStack | None = None
        self._seconds: dict[str, float] = {}
        for role in ROLES:
            check_claims(type(self.triple.claims(role)), _check_names())
            self.triple.validated(role, self.triple.choice(role).options)
        registry().load("transport", self.triple.transport.name)
        self._places = Places(self.triple)
        self._directory = tempfile.TemporaryDirectory(prefix="rlbridge-conform-")

    # What pytest asks

    def wants(self, found: Check | None) -> bool:
        """Whether a test is part of this run."""
        if found is None:
            return True
        if found.ray and self.settings.carrier == "processes":
            return False
        return found.level in self.settings.levels and (found.role is None or found.role in self.triple.tested)

    def order(self, found: Check | None) -> int:
        """Where a test stands: level by level, what is about Ray last in each, and what is no check before them."""
        return -1 if found is None else 2 * LEVELS.index(found.level) + found.ray

    def admit(self, found: Check, name: str) -> None:
        """Let a check run, or skip it.

        Raises:
            NotRun: this machine lacks what it takes.
            pytest.skip.Exception: the backend does not claim what the check is about.
        """
        for need in found.needs:
            role, _, claim = need.partition(".")
            claims = self.triple.claims(cast("Role", role))
            if not claims.claims(claim):
                pytest.skip(f"not claimed by the {role} {claims.backend.name}: {claim}")
        if reason := self._unavailable(found):
            not_run(reason)
        for need in found.machine:
            if reason := lacks(need):
                not_run(reason)

    def stages(self, found: Check) -> Stages:
        """Stages for a check, of the triple that it is about."""
        triple = self.triple if found.role is None else self.triple.only(found.role)
        self._remarks = Stages(self, triple, self._carrier(found, triple))
        return self._remarks

    def note(self, found: Check, name: str, report: pytest.TestReport, error: BaseException | None) -> None:
        """Keep the state of a check after one of its phases."""
        ident = f"{found.level}.{name.removeprefix('test_')}"
        self._seconds[ident] = self._seconds.get(ident, 0.0) + report.duration
        known = self._known_failure(name.removeprefix("test_"))
        state = _state(report, error)
        if state is None or any(result.id == ident for result in self.results):
            return
        if state in ("fail", "error"):
            self._drop_stages()
        detail, words = _words(report, error, state)
        if state == "pass" and self._remarks is not None:
            detail = "; ".join(self._remarks.remarks)
        if known is not None and state == "pass":
            state, report.outcome = "fail", "failed"
            detail = f"it was expected to fail ({known}), and passed: take it out of known_failures"
            report.longrepr = detail
        elif known is not None and state == "fail":
            detail = f"known failure ({known}): {detail}"
            report.outcome, report.wasxfail = "skipped", known
        self.results.append(
            Ended(id=ident, level=found.level, state=state, seconds=round(self._seconds[ident], 3), detail=detail, **words)
        )

    def finish(self, *, ended: bool = True) -> None:
        """End every process, and write the report where one is wanted and the run has come to its end."""
        self._drop_stages()
        self._places.close()
        if self._on_ray is not None:
            self._on_ray.close()
        if ended:
            self._result = result_of(self)
        if self._result is not None and self.settings.report is not None:
            write_report(self._result, self.settings.report)
        self._directory.cleanup()

    def summary(self) -> list[str]:
        """The verdict, and where the report is."""
        place = self.settings.report
        if self._result is None:
            return []
        return [verdict_line(self._result), *([f"report: {place / 'report.html'}"] if place is not None else [])]

    # What the stages ask

    def stage(self, triple: Triple, carrier: Carrier, scene: Scene) -> Stage:
        """A stage that is kept: the same one for equal scenes."""
        key = f"{triple} {carrier} {scene.key()}"
        if key not in self._stages:
            while len(self._stages) >= _KEPT_STAGES:
                self._close(self._stages.pop(next(iter(self._stages))))
            self._stages[key] = self.new_stage(triple, carrier, scene)
        self._stages[key] = self._stages.pop(key)  # the last used is the last to go
        return self._stages[key]

    def new_stage(
        self, triple: Triple, carrier: Carrier, scene: Scene, prepare: Mapping[str, Callable[[], None]] | None = None
    ) -> Stage:
        """A stage of one's own, to be closed with `close`."""
        if carrier == "ray" and self._on_ray is None:
            self._on_ray = _ray()
        self._made += 1
        directory = Path(self._directory.name) / f"stage-{self._made}"
        return Stage(triple, scene, carrier, directory, self._places, self.settings.protocol, prepare)

    def close(self, stage: Stage) -> None:
        """End a stage of one's own."""
        self._close(stage)

    def _close(self, stage: Stage) -> None:
        if stage.triple.transport == self.triple.transport and (not stage.scene.transport or self._over_rdma(stage)):
            self.reports += stage.reports
        stage.close()

    def _over_rdma(self, stage: Stage) -> bool:
        """Whether the wire of a stage was chosen for it, and is the one that the level rdma is about."""
        asked = self.triple.claims("transport").over_rdma()
        return asked is not None and stage.scene.transport.items() >= asked.items()

    def _drop_stages(self) -> None:
        while self._stages:
            self._close(self._stages.popitem()[1])

    def _carrier(self, found: Check, triple: Triple) -> Carrier:
        if found.ray or not triple.claims("transport").claims("plain_processes"):
            return "ray"
        if self.settings.carrier != "auto":
            return cast("Carrier", self.settings.carrier)
        return "ray" if found.level == "sync" else "processes"

    def _unavailable(self, found: Check) -> str | None:
        if found.role in ("trainer", "generator"):
            return None
        name = self.triple.transport.name
        options = self.triple.validated("transport", self.triple.transport.options)
        reason: str | None = registry().load("transport", name).unavailable(options, "cpu")
        return None if reason is None else f"the transport {name} cannot work here: {reason}"

    def _known_failure(self, name: str) -> str | None:
        for role in sorted(self.triple.tested):
            known = self.triple.claims(role).known_failures
            for ident in (name, name.partition("[")[0]):
                if ident in known:
                    return known[ident]
        return None


class Stages:
    """What the fixture `stages` gives a check."""

    def __init__(self, run: Run, triple: Triple, carrier: Carrier) -> None:
        self.run, self.triple, self.carrier = run, triple, carrier
        self._own: list[Stage] = []
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        """Say something in the report of a check that passes: what was measured."""
        self.remarks.append(text)

    def __call__(self, **scene: Any) -> Stage:
        """A stage of that `Scene`, which another check may have used and may use again: leave it in good health."""
        return self.run.stage(self.triple, self.carrier, Scene(**scene))

    def fresh(self, prepare: Mapping[str, Callable[[], None]] | None = None, **scene: Any) -> Stage:
        """A stage of this check's own, which it may break; `prepare` as in `Stage`."""
        self._own.append(self.run.new_stage(self.triple, self.carrier, Scene(**scene), prepare))
        return self._own[-1]

    def end_of_check(self) -> None:
        """End the stages of one's own."""
        while self._own:
            self.run.close(self._own.pop())


@functools.cache
def _check_names() -> tuple[str, ...]:
    """Of all checks, also of those that this run has not collected."""
    from rlbridge_conformance import suite  # which imports this module

    return tuple(name.removeprefix("test_") for name in suite.__all__)


def _state(report: pytest.TestReport, error: BaseException | None) -> State | None:
    if report.when == "call" and report.outcome == "passed":
        return "pass"
    if error is None or report.outcome == "passed":
        return None
    if isinstance(error, NotRun):
        return "not_run"
    if isinstance(error, pytest.skip.Exception):
        return "skip"
    if isinstance(error, SuiteError):
        return "error"
    # pytest-timeout ends a check that hangs with pytest.fail.
    ours = isinstance(error, (AssertionError, RlbridgeError, TimeoutError, pytest.fail.Exception))
    return "fail" if ours else "error"


def _words(report: pytest.TestReport, error: BaseException | None, state: State) -> tuple[str, dict[str, str]]:
    """What is said of a check: a text, and where there is more, what was looked at, what was expected and what was got."""
    if state == "pass" or error is None:
        return "", {}
    if isinstance(error, pytest.skip.Exception):
        return str(error.msg).removeprefix("not run: "), {}
    if isinstance(error, Mismatch):
        return str(error), {"what": error.what, "expected": error.expected, "got": error.got}
    if isinstance(error, RlbridgeError):
        return in_full(error), {"what": error.what, "expected": "no error", "got": f"{type(error).__name__}: {error}"}
    said = f"{type(error).__name__}: {error}"
    return f"{said}\n{report.longreprtext}" if state == "error" else said, {}


def _ray() -> contextlib.ExitStack:
    """Ray on this machine, until the stack is closed."""
    from rlbridge.cluster.ray_cluster import cluster

    stack = contextlib.ExitStack()
    stack.enter_context(cluster([], None))
    return stack
