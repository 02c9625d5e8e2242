"""Booting the guest, running one command in it, and bringing back what the command says and its exit code."""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO

from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.soft_roce.kernel import Kernel

OUT = "/run/out"
"""Where the guest sees the directory that it shares with this machine, to write to."""

_PREFIX = "guest: "
_END_SECONDS = 20.0


def run(
    kernel: Kernel,
    command: Sequence[str],
    out: Path,
    *,
    environment: Mapping[str, str],
    cwd: Path,
    seconds: float,
    say: Callable[[str], None],
    step: Callable[[str], None],
) -> int:
    """Boot, run the command as root in `cwd`, switch off; the command's exit code.

    Args:
        kernel: What to boot.
        command: Absolute paths mean the same as here; `OUT` is `out`.
        out: A directory of this machine, for what comes back.
        environment: Variables of the command; none of this machine's cross by themselves.
        cwd: Where the command runs.
        seconds: After which the guest is ended.
        say: Given each line that the command prints.
        step: Told what has been reached.

    Raises:
        SuiteError: the guest cannot be started, does not come up, or does not end in time; with what it said last.
    """
    lines = [f"cd {shlex.quote(str(cwd))}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [f"exec {shlex.join(command)} 2>&1"]
    (out / "command.sh").write_text("\n".join(lines) + "\n")
    (out / "init.sh").write_text((files(__package__) / "init.sh").read_text())
    code = out / "exit-code"
    code.unlink(missing_ok=True)
    log: list[str] = []
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            _qemu(kernel, out), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise SuiteError(f"qemu cannot be started: {error.strerror}") from error
    try:
        assert process.stdout is not None
        for line in _lines(process.stdout, deadline):
            log.append(line)
            if line.startswith(f"{_PREFIX}up at "):
                step("boot")
            elif line.startswith(f"{_PREFIX}done at "):
                step("command")
            elif line.startswith(_PREFIX) or any(kept.startswith(f"{_PREFIX}up at ") for kept in log):
                say(line)
        process.wait(_END_SECONDS)
    except TimeoutError:
        raise SuiteError(f"the guest did not end within {seconds:.0f} s; it said last:\n{_last(log)}") from None
    except subprocess.TimeoutExpired:
        raise SuiteError(f"the guest closed its console and did not end; it said last:\n{_last(log)}") from None
    finally:
        process.kill()
        process.wait()
        (out / "guest.log").write_text("\n".join(log) + "\n")
    if not code.is_file():
        raise SuiteError(f"the guest ended before its command did; it said last:\n{_last(log)}")
    return int(code.read_text())


def _qemu(kernel: Kernel, out: Path) -> list[str]:
    memory = max(2, min(8, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30 // 3))
    append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable nokaslr random.trust_cpu=on"
    shares: list[str] = []
    for tag, path, mode in (("root", "/", ",readonly=on"), ("out", str(out), "")):
        shares += ["-fsdev", f"local,id={tag},path={path.replace(',', ',,')},security_model=none,multidevs=remap{mode}"]
        shares += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return [
        "qemu-system-x86_64",
        *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"),
        *("-smp", str(min(4, os.cpu_count() or 1)), "-m", f"{memory}G"),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-monitor", "none", "-net", "none"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs), "-append", append),
        *shares,
    ]


def _lines(stream: IO[bytes], deadline: float) -> Iterator[str]:
    """Lines as they come, until the end of the stream.

    Raises:
        TimeoutError: the deadline has passed.
    """
    rest = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            break
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


def _last(log: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in log[-15:]) or "  nothing"
