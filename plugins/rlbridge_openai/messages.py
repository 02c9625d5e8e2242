"""What an engine and the control in its vLLM server say to one another. Imported on both sides."""

from __future__ import annotations

import msgspec

ROUTE = "/v1/rlbridge"
"""Under /v1, which is what vLLM guards with its key."""

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
        vllm: Its version.
        max_model_len: Most tokens of a prompt and its completion.
        vocabulary: How many tokens there are.
        dtype: Of its parameters.
        stop_ids: The model's own end-of-sequence tokens.
        scale_out: Whether /inference/v1/generate is there.
        dev_mode: Whether vLLM's own control routes are, which ask for no key.
        missing: Arguments and variables that it should have been started with.
    """

    instance: str
    model: str
    vllm: str
    max_model_len: int
    vocabulary: int
    dtype: str
    stop_ids: list[int]
    scale_out: bool
    dev_mode: bool
    missing: list[str]
