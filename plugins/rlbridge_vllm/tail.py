"""The warnings and errors of an engine's processes, kept for the error that tells of its end."""

from __future__ import annotations

import logging
from pathlib import Path

LOG_VARIABLE = "RLBRIDGE_VLLM_LOG"


class _Kept(logging.FileHandler):
    """Written by every process of one engine."""


def keep_log(path: str) -> None:
    """Append this process's warnings of vLLM to the file, and to no other."""
    logger = logging.getLogger("vllm")
    forget_log()
    handler = _Kept(path, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(processName)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


def forget_log() -> None:
    """Write this process's warnings nowhere any more."""
    logger = logging.getLogger("vllm")
    for handler in [h for h in logger.handlers if isinstance(h, _Kept)]:
        logger.removeHandler(handler)
        handler.close()


def last_lines(path: str, count: int = 12) -> str:
    """The end of what was written, or ""."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.strip())[-4000:] if len(lines) <= count else "\n".join(lines[-count:])
