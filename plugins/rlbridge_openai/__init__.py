"""Generation over HTTP, on a server with OpenAI's API that somebody else has started."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, hookimpl


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """The backend `openai`."""
    return [
        Backend(
            name="openai",
            load="rlbridge_openai.generator:OpenAIGenerator",
            options="rlbridge_openai.options:OpenAIGeneratorOptions",
            summary="A vLLM or SGLang server that is already there, and was started with rlbridge's control in it.",
            extra="openai",
            requires=("httpx2", "tenacity"),
            capabilities=frozenset({Capability.PAUSE_KEEP, Capability.PAUSE_ABORT}),
            requirements="rlbridge_conformance.ours:ServedByOthers",
        )
    ]
