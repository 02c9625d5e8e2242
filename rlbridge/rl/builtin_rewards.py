"""The reward functions that come with rlbridge."""

from __future__ import annotations

import functools
import multiprocessing
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from rlbridge import Backend, hookimpl

_TIMEOUT_SECONDS = 5

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
"""Two letters or more that are no LaTeX command: a sign of prose."""


@hookimpl
def rlbridge_rewards() -> Sequence[Backend]:
    """`exact_match` and `numeric`."""
    return (
        Backend(
            "exact_match",
            load="rlbridge.rl.builtin_rewards:exact_match",
            summary="1 if the completion is the answer, white space around it aside",
        ),
        Backend(
            "numeric",
            load="rlbridge.rl.builtin_rewards:numeric",
            summary="1 if the completion ends in a number or LaTeX formula that equals the answer",
            requires=("math_verify",),
        ),
    )


def exact_match(completion: str, answer: str | None) -> float:
    """1.0 if `completion` is `answer`, white space around them aside; else 0.0."""
    return float(completion.strip() == _given(answer).strip())


def numeric(completion: str, answer: str | None) -> float:
    r"""1.0 if math-verify finds a formula in `completion` that equals `answer`; 0.0 if not, or if it finds none.

    `answer` may be a bare formula (`\frac{1}{2}`), or prose that holds one ("#### 42", "the answer is $42$").
    """
    known = _given(answer)
    # A model may well write 9^9^9^9, which sympy would evaluate for hours. math-verify 0.9 stops that by SIGALRM, which only a
    # main thread can have; on another thread its time-outs have to be off. So there a child process does it in its main thread.
    if threading.current_thread() is threading.main_thread():
        return _equal(known, completion)
    return _child().submit(_equal, known, completion).result()


def _equal(answer: str, completion: str) -> float:
    from math_verify import parse, verify

    gold = parse(answer if _WORD.search(answer) else f"${answer}$", parsing_timeout=_TIMEOUT_SECONDS)
    found = parse(completion, parsing_timeout=_TIMEOUT_SECONDS)
    return float(verify(gold, found, timeout_seconds=_TIMEOUT_SECONDS))


@functools.cache
def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _given(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the prompt has no answer to compare with; set data.answer_key")
    return answer
