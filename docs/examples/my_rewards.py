"""Rewards of your own: one call a completion, a number back."""

from __future__ import annotations


def exact_match(completion: str, answer: str) -> float:
    """1 for the answer itself, white space around it aside."""
    return float(completion.strip() == answer)


def short_and_right(completion: str, answer: str, max_words: int = 20) -> float:
    """Half a point for the answer, half for saying little; `max_words` is a key of the prompt's line, where it has one."""
    return 0.5 * (answer in completion) + 0.5 * (len(completion.split()) <= max_words)
