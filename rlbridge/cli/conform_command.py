"""`rlbridge conform`: backends held to their contracts by the conformance suite, which runs in a pytest of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from rlbridge.errors import ConfigError, PluginError, RlbridgeError
from rlbridge.importing import import_target, install_hint, missing_module
from rlbridge.plugins import MODULES_VARIABLE

_SUITE = "rlbridge_conformance"  # looked up by name, as backends are: the core imports it nowhere
_NEEDED = ("pytest", "pytest_timeout", "jinja2", _SUITE)
_FILES = ("result.json", "report.html", "junit.xml")
_REFERENCE = "reference"  # the suite's own backend of each role
_RDMA = "rdma"  # the level
_END_SECONDS = 15.0
_BROKE = 2
_USAGE = 4  # pytest's own code; it has said what is wrong
_NO_CHECKS = 5

_Several = Annotated[Sequence[str], Parameter(negative="", show_default=False)]


class SuiteBrokeError(RlbridgeError):
    """The suite ended without a result."""

    exit_code = _BROKE


def conform(
    *overrides: str,
    trainer: str | None = None,
    generator: str | None = None,
    transport: str | None = None,
    level: str | None = None,
    first: Annotated[str | None, Parameter(name="--from")] = None,
    report: Path = Path("conformance-report"),
    requirements: _Several = (),
    plugin: _Several = (),
    only: Annotated[str | None, Parameter(name="-k")] = None,
    list_: Annotated[bool, Parameter(name="--list", negative="", show_default=False)] = False,
    self_test: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    matrix: Path | None = None,
    soft_roce: Annotated[bool, Parameter(negative="", show_default=False)] = False,
) -> int:
    """Hold backends to their contracts, and say whether they conform.

    Name one role or more; the suite supplies the others. Exit code: 0 conformant, 1 not, 2 the suite broke, 3 incomplete,
    since this machine lacks something that is claimed.

    Parameters
    ----------
    overrides
        Options of the named backends, for example transport.wire=tcp.
    trainer
        The trainer backend.
    generator
        The generator backend.
    transport
        The transport backend.
    level
        Up to which level: contract, sync, rdma, faults, speed. Default: sync; with --self-test: faults.
    first
        From which level on. Default: contract.
    report
        The directory of report.html, result.json and junit.xml.
    requirements
        A class that says what a backend claims, as module:Class. May be repeated.
    plugin
        A module that brings backends, besides those that are installed. May be repeated.
    only
        An expression of pytest's -k: only the checks whose names fit. With --self-test: a part of the names of broken backends.
    list_
        List the checks that would be run, by level, and run none.
    self_test
        Run the suite on backends that are broken on purpose: it has to fail every one.
    matrix
        With --self-test: run whole levels, and write which check failed what to this file.
    soft_roce
        Run the level rdma over an RDMA device of software (rdma_rxe): in a guest, where this machine's kernel has none.
        With --from, earlier levels too. RLBRIDGE_SOFT_ROCE=0 leaves the guest out: what needs a device is then not run.
    """
    _installed()
    levels = _of_suite("levels:LEVELS")
    for given_level in filter(None, (first, level)):
        if given_level not in levels:
            raise ConfigError(f"there is no level {given_level!r}", todo=f"levels: {', '.join(levels)}")
    env = _environment(plugin)
    in_guest = soft_roce and not list_ and not _of_suite("soft_roce.harness:left_out")()
    if soft_roce:
        level = level or _RDMA
        first = first or (None if self_test else _RDMA)
    only = None if only is None else re.sub(rf"\b({'|'.join(levels)})\.", "", only)  # as the ids of a report have it
    if first and level and levels.index(first) > levels.index(level):
        raise ConfigError(f"--from {first} comes after --level {level}", todo=f"levels, in their order: {', '.join(levels)}")
    if self_test:
        if list_ or first or overrides or requirements or any((trainer, generator, transport)):
            raise ConfigError(
                "--self-test is of the suite and its own backends", todo="it goes with --level, -k and --matrix alone"
            )
        given = [*_option("--level", level), *_option("-k", only), *_option("--matrix", matrix)]
        if in_guest:
            if matrix is not None:
                raise ConfigError("--matrix would be written in the guest", todo="leave it out with --soft-roce")
            return _soft_roce(["conform", "--self-test", *given], report)
        code = _run([f"{_SUITE}.self_test", *given], env)
        return code if code in (0, 1, 3) else _BROKE
    if matrix is not None:
        raise ConfigError("--matrix belongs to --self-test", todo="rlbridge conform --self-test --matrix FILE")
    names = {"trainer": trainer, "generator": generator, "transport": transport}
    if list_ and not any(names.values()):
        names, level = dict.fromkeys(names, _REFERENCE), level or "speed"
    if not any(names.values()):
        raise ConfigError(
            "which backend is to be held to its contract?",
            todo="rlbridge conform --transport NAME, or --trainer, or --generator; rlbridge plugins lists those there are",
        )
    if in_guest:
        named = [argument for role, name in names.items() for argument in _option(f"--{role}", name)]
        named += [argument for target in requirements for argument in ("--requirements", target)]
        named += [argument for module in plugin for argument in ("--plugin", module)]
        levels_asked = [*_option("--from", first), *_option("--level", level), *_option("-k", only)]
        return _soft_roce(["conform", *overrides, *named, *levels_asked], report)
    # Nothing but the suite's own plugins: others reorder tests, retry them, or run them at once.
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    asked = [f"--rlbridge-{role}={name}" for role, name in names.items() if name]
    asked += [f"--rlbridge-set={text}" for text in overrides]
    asked += [f"--rlbridge-plugin={module}" for module in plugin]
    asked += [f"--rlbridge-requirements={target}" for target in requirements]
    asked += [*_option("--rlbridge-from", first), *_option("--rlbridge-level", level), *_option("-k", only)]
    if list_:
        return _BROKE if _run([f"{_SUITE}.listing", *_settings(), *asked], env) else 0
    console = Console(highlight=False)
    console.print(" > ".join(names[role] or _REFERENCE for role in ("trainer", "transport", "generator")), style="bold")
    return _tried(asked, report, env, only)


def _soft_roce(arguments: Sequence[str], report: Path) -> int:
    """This command with those arguments, where there is an RDMA device of software."""
    broken = _of_suite("faults:SuiteError")
    try:
        code: int = _of_suite("soft_roce.harness:run")(arguments, report)
    except broken as error:
        raise SuiteBrokeError(f"no RDMA device of software: {error.what}", todo=error.todo) from error
    return code


def _installed() -> None:
    """Refuse to go on without what the suite is made of."""
    for module in _NEEDED:
        if absent := missing_module(module):
            raise PluginError(
                f"the conformance suite is not installed: no module named {absent!r}", todo=install_hint("conform")
            )


def _environment(plugins: Sequence[str]) -> dict[str, str]:
    """The variables of the suite's process. It and its children can import what lies where the user stands."""
    paths = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    modules = [*os.environ.get(MODULES_VARIABLE, "").split(","), *plugins]
    return {
        **os.environ,
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        MODULES_VARIABLE: ",".join(filter(None, modules)),
    }


def _settings() -> list[str]:
    """The suite's own, wherever the user stands."""
    return ["-c", str(Path(_of_suite("checks:__file__")).with_name("pytest.ini")), "-p", "rlbridge", "-p", "timeout"]


def _option(name: str, value: str | Path | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _tried(asked: Sequence[str], report: Path, env: Mapping[str, str], only: str | None) -> int:
    """Run the suite, and give the exit code of its verdict."""
    try:
        report.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (report / name).unlink(missing_ok=True)  # so that none is taken for one of this run
    except OSError as error:
        raise ConfigError(
            f"no report can be written to {report}: {error.strerror}", todo="--report names a directory"
        ) from error
    quiet = ["-qq", "-rN", "--disable-warnings"]
    files = [f"--rlbridge-report={report}", f"--junitxml={report / 'junit.xml'}"]
    try:
        code = _run(["pytest", *_settings(), "--pyargs", _SUITE, *quiet, *files, *asked], env)
    except BaseException:
        (report / "junit.xml").unlink(missing_ok=True)  # of a run that was interrupted
        raise
    if (report / "junit.xml").is_file():
        _of_suite("report.junit:redact_junit")(report / "junit.xml")
    if code == _USAGE:
        return _BROKE
    if not (report / "result.json").is_file():
        (report / "junit.xml").unlink(missing_ok=True)
        if code == _NO_CHECKS and only:
            raise ConfigError(f"no check fits -k {only!r}", todo="rlbridge conform --list shows their names")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise SuiteBrokeError(f"the suite broke: pytest {how}, and left no result")
    result = _of_suite("report:read_result")(report)
    sys.stdout.write("\n".join(_of_suite("report.terminal:closing_lines")(result, report)) + "\n")
    verdict: int = _of_suite("report:exit_code")(result.verdict)
    return verdict


def _of_suite(target: str) -> Any:
    return import_target(f"{_SUITE}.{target}", "the conformance suite")


def _run(module: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a module with its arguments to its end; should this process be ended before, so are that one and its children."""
    sys.stdout.flush()
    # A group of its own: an interrupt reaches it once, from here, and its children can be ended with it.
    process = subprocess.Popen([sys.executable, "-m", *module], env=dict(env), start_new_session=True)
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit(number: int, _frame: FrameType | None) -> Any:
    sys.exit(128 + number)
