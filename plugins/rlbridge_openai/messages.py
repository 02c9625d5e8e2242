"""What an engine and the control in its server say to one another. Imported on both sides."""

from __future__ import annotations

import msgspec

ROUTE = "/v1/rlbridge"
"""Under /v1, which is what servers guard with their key."""

INSTANCE_HEADER = "x-rlbridge-instance"
"""Names the server's process in each of its answers: one that was started anew holds other weights."""


class Open(msgspec.Struct, frozen=True):
    """Put subscribers over the parameters of every rank, for the engine of that name."""

    engine: str
    install: str


class Facts(msgspec.Struct, frozen=True):
    """What a server is, and how it was started.

    Attributes:
        instance: Names the process.
        model: What it has loaded: a directory or a name.
        server: "vLLM" or "SGLang".
        release: Its version.
        max_model_len: Most tokens of a prompt and its completion.
        vocabulary: How many tokens there are.
        dtype: Of its parameters.
        stop_ids: The model's own end-of-sequence tokens.
        apis: What `generator.api` may be.
        dev_mode: Whether vLLM's own control routes are open, which ask for no key.
        missing: Arguments and variables that it should have been started with.
    """

    instance: str
    model: str
    server: str
    release: str
    max_model_len: int
    vocabulary: int
    dtype: str
    stop_ids: list[int]
    apis: list[str]
    dev_mode: bool
    missing: list[str]
