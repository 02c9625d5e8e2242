"""Reward functions as a user writes them, good and bad."""

from __future__ import annotations


def more_digits(completion: str) -> float:
    return sum(c.isdigit() for c in completion) / 3


def raises(completion: str) -> float:
    if completion is not None:
        raise KeyError("no such answer")
    return 0.0


def not_a_number(completion: str) -> float:
    return float("nan")


calls = 0


def fails_later(completion: str) -> float:
    """Good for the first evaluation and the first step, then it breaks."""
    global calls
    calls += 1
    return float("nan") if calls > 4 + 16 else more_digits(completion)
