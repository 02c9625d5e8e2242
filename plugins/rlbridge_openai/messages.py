"""What an engine and the control in its server say to one another. Imported on both sides."""

from __future__ import annotations

import msgspec

ROUTE = "/v1/rlbridge"
"""Under /v1, which is what servers guard with their key."""

INSTANCE_HEADER = "x-rlbridge-instance"
"""Names, in each answer, what a server holds since somebody has opened it: one that was started or opened anew holds other
weights. In a call it is what the caller knows."""


class Open(msgspec.Struct, frozen=True):
    """Put subscribers over the parameters of every rank, for the engine of that name."""

    engine: str
    install: str


class Opened(msgspec.Struct, frozen=True):
    """The answer: the server's new name, and that of each rank to (pid, parent's pid, how weights are installed)."""

    instance: str
    ranks: list[bytes]


class Facts(msgspec.Struct, frozen=True):
    """What a server is, and how it was started.

    Attributes:
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
