"""The pytest plugin: options, the stages of the checks, the states of a report. Every pytest loads it: it imports little."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from rlbridge.errors import RlbridgeError
from rlbridge_conformance.checks import MARK, Mismatch, check_of, in_full
from rlbridge_conformance.levels import LEVELS

if TYPE_CHECKING:
    from rlbridge_conformance.run import Run, Stages

_RUN: pytest.StashKey[Run] = pytest.StashKey()

_OPTIONS = {
    "trainer": "the trainer backend to hold to its contract",
    "generator": "the generator backend to hold to its contract",
    "transport": "the transport backend to hold to its contract",
    "from": "from which level on (contract)",
    "level": f"up to which level: {', '.join(LEVELS)} (sync)",
    "report": "a directory for result.json and report.html",
    "carrier": "what the parties run in: auto, processes or ray (auto)",
    "protocol": "other classes of the core's own protocol, as publisher=module:Class or engine=module:Class",
}
_LISTS = {
    "set": "an option of a tested backend, as transport.wire=tcp",
    "requirements": "a requirements class, as module:Class",
    "plugin": "a module that registers backends, besides those that are installed",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rlbridge-NAME` and the ini option `rlbridge_NAME`."""
    group = parser.getgroup("rlbridge", "the conformance suite of rlbridge")
    for name, text in _OPTIONS.items():
        group.addoption(f"--rlbridge-{name}", metavar=name.upper(), help=text)
        parser.addini(f"rlbridge_{name}", text, default="")
    for name, text in _LISTS.items():
        group.addoption(f"--rlbridge-{name}", action="append", default=[], metavar=name.upper(), help=text)
        parser.addini(f"rlbridge_{name}", text, type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", f"{MARK}(check): a check of rlbridge's conformance suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin a run if any check was collected: leave out what was not asked for, and put the levels in their order."""
    if not any(check_of(item) for item in items):
        return
    from rlbridge_conformance.run import Run, settings_of

    try:
        run = Run(settings_of(_settings(config)))
    except RlbridgeError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[_RUN] = run
    kept = [item for item in items if run.wants(check_of(item))]
    config.hook.pytest_deselected(items=[item for item in items if not run.wants(check_of(item))])
    items[:] = sorted(kept, key=lambda item: run.order(check_of(item)))


def _settings(config: pytest.Config) -> dict[str, Any]:
    """The command line before the ini file."""
    found: dict[str, Any] = {n: config.getoption(f"rlbridge_{n}") or config.getini(f"rlbridge_{n}") for n in _OPTIONS}
    return found | {n: [*config.getini(f"rlbridge_{n}"), *config.getoption(f"rlbridge_{n}")] for n in _LISTS}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a check whose claims are not made, or that cannot be run here."""
    run, found = item.config.stash.get(_RUN, None), check_of(item)
    if run is not None and found is not None:
        run.admit(found, item.name)


@pytest.fixture
def stages(request: pytest.FixtureRequest) -> Generator[Stages]:
    """`stages(ranks=2, engines=1, ...)`: a stage for this check, perhaps one that an earlier check has left in good health."""
    run = request.config.stash[_RUN]
    found = check_of(request.node)
    assert found is not None
    made = run.stages(found)
    yield made
    made.end_of_check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the state of a check."""
    report = yield
    run, found = item.config.stash.get(_RUN, None), check_of(item)
    if run is not None and found is not None:
        error = call.excinfo.value if call.excinfo else None
        run.note(found, item.name, report, error)
        if report.failed and isinstance(error, (Mismatch, RlbridgeError)) and item.config.getoption("tbstyle") == "auto":
            report.longrepr = in_full(error)  # it says more than the way through the suite that led there
    return report


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """With -qq pytest tells no failures: who asks for so little reads the result, as `rlbridge conform` does."""
    if config.stash.get(_RUN, None) is None or not report.failed or not _is_brief(config):
        return None
    return "told elsewhere", "F" if report.when == "call" else "E", "FAILED"


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """End every process, and write the report, unless the run did not come to its end: that one is no result."""
    ended = False
    try:
        done = yield
        ended = True
        return done
    except session.Failed:  # -x
        ended = True
        raise
    finally:
        _finish(session.config, ended=ended and not session.config.option.collectonly)


def _finish(config: pytest.Config, *, ended: bool) -> None:
    run = config.stash.get(_RUN, None)
    if run is None:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.resume_global_capture()  # Ray prints that its workers have ended
    try:
        run.finish(ended=ended)
    finally:
        capture.suspend_global_capture()
        capture.read_global_capture()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The verdict in one line, and where the report is."""
    run = config.stash.get(_RUN, None)
    if run is not None and not _is_brief(config):
        for line in run.summary():
            terminalreporter.write_line(line)


def _is_brief(config: pytest.Config) -> bool:
    return config.get_verbosity() < -1
