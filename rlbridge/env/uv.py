"""uv, which makes environments and compiles locks: how it is called, and what its failures mean."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlbridge.errors import BuildError, PluginError
from rlbridge.importing import install_hint

Tell = Callable[[str, str], None]
"""Is told of progress: the phase, and a line of it; the line is empty where a phase begins."""

_TAIL = 20
_END_SECONDS = 10.0

# They point to the driver's environment, or to another, where uv is to work on the one that it is told.
_HARMFUL = (
    "CONDA_PREFIX",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "UV_PROJECT",
    "UV_PROJECT_ENVIRONMENT",
    "UV_PYTHON",
    "UV_SYSTEM_PYTHON",
    "UV_WORKING_DIR",
    "UV_WORKING_DIRECTORY",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
)

_FROM_PIP = {
    "UV_FIND_LINKS": ("PIP_FIND_LINKS", ","),
    "UV_DEFAULT_INDEX": ("PIP_INDEX_URL", " "),
    "UV_INDEX": ("PIP_EXTRA_INDEX_URL", " "),
    "SSL_CERT_FILE": ("PIP_CERT", " "),
}

NO_SPACE = "free space, or have the environments elsewhere: RLBRIDGE_ENVS=DIRECTORY"

_TODO = (
    (r"no space left on device|os error 28|disk quota exceeded", NO_SPACE),
    (
        r"no version of|no solution found|no wheels? with a matching|was not found in the (package registry|provided)"
        r"|because there is no|not available for the current|only has wheels",
        "the lock asks for what this machine's indexes do not have; UV_INDEX and UV_FIND_LINKS name further ones,"
        " and UV_TORCH_BACKEND=cpu is where torch's +cpu wheels lie",
    ),
    (r"hash mismatch", "what the index has is not what the lock was made from; the plugin's author makes a new lock"),
    (
        r"dns error|error sending request|failed to (fetch|download)|connect(ion)? (error|refused|reset|timed out)"
        r"|network (is )?(unreachable|connectivity)|timed out|offline",
        "is the network there? UV_DEFAULT_INDEX, UV_INDEX, UV_FIND_LINKS and HTTPS_PROXY say where packages come from;"
        " the next try goes on with what has been downloaded",
    ),
)


def run_uv(arguments: Sequence[str], what: str, tell: Tell, *, cwd: Path, held: Sequence[int] = ()) -> None:
    """Run uv to its end; its lines are told as they come. `what` says what it does; the descriptors `held` stay open in it.

    Raises:
        PluginError: there is no uv.
        BuildError: it failed; the end of what it said is in the error.
    """
    tell(what, "")
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
    process = subprocess.Popen(
        [_uv(), *arguments],
        cwd=cwd,
        env=uv_variables(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=held,
    )
    try:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            tell(what, line.rstrip())
        code = process.wait()
    finally:
        _end(process)
    if code:
        raise _failure(what, code, "\n".join(tail))


def uv_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of uv's process: the driver's, without what names another environment, and pip's where uv's are not set."""
    kept = {name: value for name, value in variables.items() if name not in _HARMFUL}
    for name, (of_pip, separator) in _FROM_PIP.items():
        if of_pip in variables:
            kept.setdefault(name, separator.join(variables[of_pip].split()))
    if links := kept.get("UV_FIND_LINKS"):  # uv is started in another directory
        kept["UV_FIND_LINKS"] = ",".join(_absolute(place) for place in links.split(","))
    kept["UV_NO_PROGRESS"] = "1"
    return kept


def _absolute(place: str) -> str:
    return place if "://" in place or not Path(place).exists() else str(Path(place).absolute())


def _uv() -> str:
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError) as error:
        raise PluginError(f"environments are made with uv, and there is none: {error}", todo=install_hint("uv")) from error


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdout:
        process.stdout.close()
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()
        process.wait()


def _failure(what: str, code: int, said: str) -> BuildError:
    words = " ".join(said.split())  # uv breaks its lines where it likes
    todo = next((todo for pattern, todo in _TODO if re.search(pattern, words, re.IGNORECASE)), "")
    ended = f"uv was ended by signal {-code}" if code < 0 else "uv failed"
    return BuildError(f"{what}: {ended}:\n{_indented(said)}", todo=todo)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (it said nothing)"
