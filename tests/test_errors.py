"""Errors say what, where and what to do, on both sides of a process boundary."""

from __future__ import annotations

import pickle

import pytest

from rlbridge import errors
from rlbridge.errors import DigestError, PeerLostError, RlbridgeError, from_wire, to_wire

KINDS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RlbridgeError)]


def test_an_error_reads_what_where_and_what_to_do() -> None:
    error = DigestError("bytes differ", tensor="lm_head", version=3, peer="trainer[1]", todo="sync again")
    assert str(error) == "bytes differ [peer trainer[1], version 3, tensor lm_head]\n  sync again"


def test_what_is_not_known_is_not_said() -> None:
    assert str(RlbridgeError("it failed", rank=None)) == "it failed"


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_an_error_is_the_same_after_a_process_boundary(kind: type[RlbridgeError]) -> None:
    error = kind("it failed", todo="do this", rank="trainer[0]", version=7)
    for other in (pickle.loads(pickle.dumps(error)), from_wire(to_wire(error))):
        assert type(other) is kind
        assert (other.what, other.todo, other.where) == (error.what, error.todo, error.where)
        assert str(other) == str(error)


def test_somebody_elses_error_keeps_its_name() -> None:
    crossed = from_wire(to_wire(ZeroDivisionError("by zero")))
    assert type(crossed) is RlbridgeError
    assert crossed.what == "ZeroDivisionError: by zero"


def test_somebody_elses_error_keeps_its_traceback() -> None:
    try:
        {}["nothing"]
    except KeyError as error:
        crossed = from_wire(to_wire(error))
    for other in (crossed, pickle.loads(pickle.dumps(crossed)), from_wire(to_wire(crossed))):
        assert '{}["nothing"]' in other.origin
        assert other.__notes__ == [f"it was raised by\n{other.origin}"]
        assert "Traceback" not in str(other)


def test_an_error_that_was_raised_from_another_brings_its_traceback() -> None:
    try:
        try:
            {}["nothing"]
        except KeyError as error:
            raise PeerLostError("gone") from error
    except PeerLostError as error:
        crossed = from_wire(to_wire(error))
    assert '{}["nothing"]' in crossed.origin
    assert str(crossed) == "gone"


def test_the_first_to_know_a_place_is_believed() -> None:
    error = PeerLostError("gone", peer="trainer[0]").at(peer="trainer[1]", phase="wire")
    assert error.where == {"peer": "trainer[0]", "phase": "wire"}
    assert "phase wire" in str(error)
