"""What the openai generator can be told in the config. Imports no framework."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlbridge.roles.generator import GeneratorOptions

_NO_CHAT = (
    "chat cannot be used: a server makes its prompt out of messages, by a template of its own, and rlbridge's prompts are token"
    " ids that have to be read as they are given; render the chat into prompts.path, and use completions or tokens"
)


class OpenAIGeneratorOptions(GeneratorOptions):
    """The generator section of the config when `generator.backend` is openai."""

    url: str | list[str] = Field(
        "http://127.0.0.1:8000",
        description="Where the server listens, with or without /v1. With several workers a list: each engine is a server.",
    )
    model: str | None = Field(None, description="The model's name on the server; null: the one that it serves.")
    api: Literal["auto", "completions", "tokens"] = Field(
        "auto",
        description="completions: OpenAI's /v1/completions, of vLLM; tokens: vLLM's /inference/v1/generate (--enable-scale-out)"
        " or SGLang's /generate, which say of every token which version made it, and are needed for sync.pause=keep; auto:"
        " tokens where the server has it.",
    )
    control: Literal["auto", "vllm", "sglang", "none"] = Field(
        "auto",
        description="How the server's weights are changed: by rlbridge's control in a vLLM or an SGLang server; auto asks the"
        " server which it is. With none an engine is refused when it is set up.",
    )
    api_key_variable: str = Field(
        "OPENAI_API_KEY",
        min_length=1,
        description="Environment variable of the engine's actor that holds the server's key. The key itself is in no config.",
    )
    insecure: bool = Field(
        False, description="Allow a server on another host that asks for no key, or that leaves its control open to others."
    )
    install: Literal["auto", "direct", "streamed"] = Field(
        "auto", description="How weights get into the parameters: as of the generator vllm; an SGLang server has direct alone."
    )
    concurrency: int = Field(256, ge=1, description="Most requests that are sent to a server at once; the others wait here.")
    request_seconds: float = Field(3600.0, gt=0, description="Longest that one request may take, its repetitions included.")
    answer_seconds: float = Field(
        300.0,
        gt=0,
        description="Longest that the server may take for a call of a sync, and running requests to end in a pause.",
    )
    retry_seconds: float = Field(
        30.0,
        ge=0,
        description="How long a server may be unreachable, overloaded (429) or failing (5xx) before a request is given up.",
    )

    @field_validator("api", mode="before")
    @classmethod
    def _is_no_chat(cls, given: object) -> object:
        if given == "chat":
            raise ValueError(_NO_CHAT)
        return given

    @field_validator("url")
    @classmethod
    def _are_urls(cls, given: str | list[str]) -> str | list[str]:
        cleaned = [_cleaned(url) for url in ([given] if isinstance(given, str) else given)]
        return cleaned[0] if isinstance(given, str) else cleaned

    @model_validator(mode="after")
    def _has_a_server_an_engine(self) -> Self:
        if len(set(self.urls)) != self.workers:
            raise ValueError(f"workers is {self.workers}, and url names {len(set(self.urls))} servers: each engine is a server")
        return self

    @property
    def urls(self) -> list[str]:
        """One a worker."""
        return [self.url] if isinstance(self.url, str) else self.url


def _cleaned(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise _refused("url holds a user or a password; keys belong into the variable that api_key_variable names")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    if parts.query or parts.fragment:
        raise _refused(f"{parts.scheme}://{parts.netloc} is given with a query or a fragment: leave them out")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1")


def _refused(message: str) -> PydanticCustomError:
    """An error that is told without the url, which may hold a key."""
    return PydanticCustomError("rlbridge", "{message}", {"message": message})
