"""A lock as text: requirements, each pinned, as uv compiles them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rlbridge.env.driver import normalised

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)\s*(\[[^\]]*\])?\s*(==|@)\s*(?P<version>[^\s;\\]+)")
_LOCAL = re.compile(r"(==[^\s;\\+]+)\+[^\s;\\]+")
_HASH = re.compile(r"^\s+--hash=\S+\s*\\?\s*\n", re.MULTILINE)
_INDEX = ("-i ", "-f ", "--index-url", "--extra-index-url", "--find-links", "--no-index", "--default-index", "--index ")


def pins(lock: str) -> dict[str, str]:
    """The names that a lock pins, normalised, and their versions."""
    return {name: version for name, version, _ in _blocks(lock) if name}


def to_install(lock: str, no_deps: Iterable[str], ray: str) -> str:
    """What an environment is synced to: the lock, with the requirements of `no_deps` in place of its own, and the driver's Ray.

    uv's sync installs what is listed and asks nobody what that needs, so requirements without dependencies are lines as others.
    """
    others = {name: line for line in no_deps for name in pins(f"{line}\n")}
    lines = [text for name, _, text in _blocks(lock) if name not in others and name != "ray"]
    if "ray" in pins(lock) and "ray" not in others:
        lines.append(f"ray=={ray}\n" if ray != pins(lock)["ray"] else _text_of(lock, "ray"))
    return "".join([*lines, *(f"{line}\n" for line in others.values())])


def published(compiled: str, header: str, resolved: Iterable[str] = ()) -> str:
    """A compiled lock as a plugin ships it: under `header`, without the place that anything was found in on this machine.

    Torch keeps no hashes: its wheel for the CPU is another file on every index. What is `resolved` on each machine keeps no
    local version, such as +cpu.
    """
    anywhere = {normalised(name) for name in resolved}
    blocks = [
        _public(_without_hashes(text) if name == "torch" or name in anywhere else text, name in anywhere)
        for name, _, text in _blocks(compiled)
        if name or not (text.isspace() or text.startswith(("#", *_INDEX)))
    ]
    return header + "".join(blocks)


def _without_hashes(block: str) -> str:
    first, newline, rest = _HASH.sub("", block).partition("\n")
    return first.rstrip("\\ ") + newline + rest


def _public(block: str, anywhere: bool) -> str:
    return _LOCAL.sub(r"\1", block, count=1) if anywhere else block


def _text_of(lock: str, wanted: str) -> str:
    return next(text for name, _, text in _blocks(lock) if name == wanted)


def _blocks(lock: str) -> Iterator[tuple[str, str, str]]:
    """Each requirement with its hashes and annotations, and each other line: the name, the version, the text."""
    block: list[str] = []
    for line in lock.splitlines():
        if block and not line.startswith((" ", "\t")):
            yield _block(block)
            block = []
        block.append(f"{line}\n")
    if block:
        yield _block(block)


def _block(lines: list[str]) -> tuple[str, str, str]:
    pin = _PIN.match(lines[0])
    return (normalised(pin["name"]), pin["version"], "".join(lines)) if pin else ("", "", "".join(lines))
