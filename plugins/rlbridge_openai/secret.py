"""The key of a server: read from the environment, sent to that server, and shown to nobody."""

from __future__ import annotations

import ipaddress
import json
import os
from urllib.parse import quote, urlsplit

from rlbridge.errors import ConfigError

_HIDDEN = "(the key)"
_LONGEST = 600


class Secret:
    """A key, or none. It has no repr, and is not copied or pickled with what holds it."""

    __slots__ = ("_value", "variable")

    def __init__(self, variable: str) -> None:
        self.variable = variable
        self._value = os.environ.get(variable, "").strip()
        if any(not 33 <= ord(character) <= 126 for character in self._value):
            raise ConfigError(f"the key in {variable} has characters that no header may have", role="generator")

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return f"Secret({self.variable})"

    def __reduce__(self) -> tuple[object, ...]:
        return Secret, (self.variable,)

    def headers(self) -> dict[str, str]:
        """What shows a server the key."""
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def hide_in(self, text: str) -> str:
        """A server's words without the key, which it may have taken from the request, and not too many of them."""
        shown = text
        for form in self._forms():
            shown = shown.replace(form, _HIDDEN)
        shown = " ".join(shown.split())
        return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} ..."

    def _forms(self) -> list[str]:
        """The key as it is, and as JSON and addresses write it; the longest first."""
        if not self._value:
            return []
        escaped = json.dumps(self._value)[1:-1]
        return sorted(
            {self._value, escaped, escaped.replace("/", "\\/"), quote(self._value), quote(self._value, safe="")}, key=len
        )[::-1]


def on_loopback(url: str) -> bool:
    """Whether only processes of this host reach the address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_door(url: str, secret: Secret, *, insecure: bool) -> None:
    """Refuse a server on another host that nobody has to show a key to.

    Raises:
        ConfigError: the variable holds no key, the server is on another host, and `insecure` is not set.
    """
    if insecure or secret or on_loopback(url):
        return
    raise ConfigError(
        f"{url} is on another host, and no key is in {secret.variable}: whoever reaches it could change its weights",
        role="generator",
        todo=f"start it with a key, and put the key into {secret.variable} (generator.insecure=true allows it without)",
    )
