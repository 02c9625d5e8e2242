"""`transport.backend: auto`: the first transport that works here, with the reasons."""

from __future__ import annotations

from collections.abc import Callable

from rlbridge.config import RunConfig
from rlbridge.config.check import incompatibilities
from rlbridge.config.sections import AUTO_TRANSPORT
from rlbridge.errors import TransportError
from rlbridge.plugins import registry
from rlbridge.roles.transport import TransportOptions

_CANDIDATES: list[tuple[str, dict[str, str]]] = [
    ("nixl", {}),
    ("rdt", {"tensor_transport": "nixl"}),
    ("rdt", {"tensor_transport": "gloo"}),
    ("object_store", {}),
]


def choose_transport(config: RunConfig, device: str, tell: Callable[[str], None]) -> TransportOptions:
    """The options of the transport that the run is going to use; with `auto`, `tell` is told what was chosen and why.

    Raises:
        TransportError: the transport that the config names cannot work on this machine.
    """
    if config.transport.backend != AUTO_TRANSPORT:
        reason = _unavailable(config.transport, device)
        if reason is not None:
            raise TransportError(
                f"transport {config.transport.backend!r} cannot work here: {reason}",
                todo="transport.backend=auto takes the first that can",
            )
        return config.transport
    for name, settings in _CANDIDATES:
        label = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])
        reason = registry().missing("transport", name)
        if reason is None:
            given = {"backend": name, **settings, "require": config.transport.require}
            options = registry().options_model("transport", name).model_validate(given)
            assert isinstance(options, TransportOptions)
            reason = "; ".join(incompatibilities(config, name)) or _unavailable(options, device)
            if reason is None:
                tell(f"transport auto: {label}, the first that works here")
                return options
        tell(f"transport auto: not {label}: {reason}")
    raise TransportError("no transport works here", todo="rlbridge plugins says why each cannot be imported")


def _unavailable(options: TransportOptions, device: str) -> str | None:
    reason: str | None = registry().load("transport", options.backend).unavailable(options, device)
    return reason
