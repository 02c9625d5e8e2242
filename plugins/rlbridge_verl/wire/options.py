"""What `checkpoint_engine.engine_kwargs.rlbridge` can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlbridge.backend import Capability
from rlbridge.errors import ConfigError
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.publisher import transport_backend

WHERE = "actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.rlbridge"


class WireOptions(BaseModel):
    """Options of rlbridge as verl's checkpoint engine."""

    model_config = ConfigDict(extra="forbid")

    transport: str = Field("nixl", description="Name of a transport of rlbridge that reads one-sidedly.")
    transport_options: dict[str, Any] = Field(
        default_factory=dict, description="Its options, as in the transport section of a run: wire, net_devices ..."
    )
    dtype: Literal["bfloat16", "float32"] | None = Field(
        None,
        description="What floating tensors are cast to before they travel; null: as the trainer has them, which is float32"
        " unless its model_dtype says otherwise, and twice the bytes of a rollout in bfloat16.",
    )
    deadline_seconds: float = Field(300.0, gt=0, description="How long a sync may take, from its first tensor to its last.")
    setup_seconds: float = Field(300.0, gt=0, description="How long the first sync with these workers may take on top.")


def wire_options(given: Mapping[str, Any]) -> WireOptions:
    """The options that verl hands to its engine.

    Raises:
        ConfigError: names each key that is wrong, or the transport that cannot be used.
    """
    try:
        options = WireOptions.model_validate(given)
        backend = transport_backend(transport_spec(options))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{WHERE}: {found}", todo=f"options: {', '.join(WireOptions.model_fields)}") from error
    if Capability.ONE_SIDED not in backend.capabilities:
        raise ConfigError(f"{WHERE}: transport {options.transport!r} is not one-sided", todo="use nixl")
    if options.transport_options.get("operation") == "write":
        raise ConfigError(f"{WHERE}: the rollout workers read; operation=write is not for them", todo="leave operation out")
    return options


def transport_spec(options: WireOptions) -> TransportSpec:
    """The transport, as a session would be told of it."""
    return TransportSpec(options.transport, {"backend": options.transport, **options.transport_options})
