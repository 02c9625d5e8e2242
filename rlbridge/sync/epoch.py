"""Which epoch a rank is in: what comes from another one is refused."""

from __future__ import annotations

from rlbridge.errors import SyncError


def token(session: str, number: int) -> str:
    """How the messages of epoch `number` of `session` are marked."""
    return f"{session}.{number}"


class Epoch:
    """The epoch that is open in one rank.

    A process that was stopped, or slow, answers old calls when it goes on: the driver has given them up, and may have begun a
    new epoch. An old `publish` would lease a buffer of the new one, an old `start_pull` would write into its arena.
    """

    def __init__(self, rank: str) -> None:
        self._rank = rank
        self._session = ""
        self._number = 0
        self._token = ""

    def begin(self, session: str, number: int) -> None:
        """Open an epoch.

        Raises:
            SyncError: this rank is in a later epoch of the same session.
        """
        if session and session == self._session and number <= self._number:
            raise SyncError(f"epoch {number} is over: this rank is in epoch {self._number}", rank=self._rank, phase="register")
        self._session, self._number, self._token = session, number, token(session, number)

    def check(self, marked: str, version: int | None = None) -> None:
        """Refuse what belongs to another epoch.

        Raises:
            SyncError: the call was made in another epoch.
        """
        if marked not in ("", self._token):
            raise SyncError(
                f"a call of epoch {marked} came in epoch {self._token or 0}: too late, or of another session; it was refused",
                rank=self._rank,
                version=version,
            )
