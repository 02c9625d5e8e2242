from __future__ import annotations

import pytest

from rlbridge.errors import SyncError
from rlbridge.sync.epoch import Epoch, token


def test_only_the_open_epoch_is_served() -> None:
    epoch = Epoch("trainer[0]")
    epoch.begin("abc", 2)
    epoch.check(token("abc", 2))
    for other in (token("abc", 1), token("abc", 3), token("xyz", 2)):
        with pytest.raises(SyncError, match=f"a call of epoch {other} came in epoch abc.2") as caught:
            epoch.check(other, 5)
        assert caught.value.where == {"rank": "trainer[0]", "version": "5"}


def test_a_call_without_a_mark_is_for_whichever_epoch_is_open() -> None:
    epoch = Epoch("trainer[0]")
    epoch.begin("abc", 2)
    epoch.check("")


def test_an_epoch_that_is_over_does_not_come_back() -> None:
    epoch = Epoch("trainer[0]")
    epoch.begin("abc", 2)
    for number in (1, 2):
        with pytest.raises(SyncError, match="is over"):
            epoch.begin("abc", number)
    epoch.begin("xyz", 1)  # a session of another driver
