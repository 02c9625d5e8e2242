"""The warnings and errors of an engine's processes, kept for the error that tells of its end."""

from __future__ import annotations

import logging
import re
from pathlib import Path

LOG_VARIABLE = "RLBRIDGE_VLLM_LOG"

_ERROR = re.compile(r"([A-Za-z_][\w.]*)?(Error|Exception|Exit|Interrupt)\b")
_MOST = 8


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


def last_words(path: str) -> str:
    """The errors that were logged, in order, each once and without its traceback. Else the end of the log, or ""."""
    try:
        lines = [line for line in Path(path).read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = list(dict.fromkeys(line for line in lines if _ERROR.match(line)))
    return "\n".join(errors[:_MOST] or lines[-_MOST:])
