"""Sharing out over threads changes nothing but the time."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbridge.weights import threads
from rlbridge.weights.threads import copy_all, in_threads


@settings(derandomize=True, max_examples=200)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), count=st.integers(2, 8))
def test_the_parts_are_every_tensor_once_and_in_order(sizes: list[int], count: int) -> None:
    parts = threads._equal_parts(sizes, count)
    assert [i for part in parts for i in range(len(sizes))[part]] == list(range(len(sizes)))
    assert len(parts) <= count + 1


@pytest.mark.parametrize("least", [1, 2**40], ids=["threads", "none"])
def test_copies_and_results_are_those_of_one_thread(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(threads, "_LEAST_BYTES", least)
    monkeypatch.setattr(threads, "_THREADS", 3)
    sources = [torch.randn(n, 3) for n in (5, 1, 0, 40, 7)]
    targets = [torch.zeros_like(s, dtype=torch.bfloat16) for s in sources]
    copy_all(targets, sources)
    assert all(torch.equal(t, s.bfloat16()) for t, s in zip(targets, sources, strict=True))

    def hash_part(part: slice) -> list[str]:
        return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in sources[part]]

    assert [h for part in in_threads(hash_part, sources) for h in part] == hash_part(slice(None))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_LEAST_BYTES", 1)
    monkeypatch.setattr(threads, "_THREADS", 2)
    with pytest.raises(RuntimeError):
        copy_all([torch.zeros(3), torch.zeros(4)], [torch.zeros(3), torch.zeros(5)])
