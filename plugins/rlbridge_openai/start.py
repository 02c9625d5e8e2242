"""What a server has to be before a run begins: asked for at the start, and refused there with what to do."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from rlbridge.errors import ConfigError
from rlbridge_openai.client import Client, Reply
from rlbridge_openai.control import VllmControl
from rlbridge_openai.messages import Facts
from rlbridge_openai.options import OpenAIGeneratorOptions
from rlbridge_openai.secret import Secret, on_loopback

START = (
    "VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --middleware rlbridge_openai.vllm_server.Control"
    " --worker-extension-cls rlbridge_vllm.worker.WorkerExtension --logits-processors rlbridge_vllm.logprobs:Tempered"
    """ --logprobs-mode processed_logits --weight-transfer-config '{"backend": "rlbridge"}' --enable-scale-out"""
)
"""How a server is started that can be used."""

_SECONDS = 30.0
_Kind = Literal["vLLM", "SGLang"]


def served_model(client: Client, wanted: str | None) -> str:
    """The model to ask for.

    Raises:
        ConfigError: the server serves none, or another one than is wanted.
    """
    reply = client.get("/v1/models", _SECONDS)
    if reply.status != 200:
        _refuse(client, f"it has no /v1/models, but answers {reply.status}: {reply.text}", "is generator.url right?")
    try:
        served = [str(model["id"]) for model in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise client.malformed("/v1/models", f"it is no list of models: {reply.text}") from None
    if wanted is not None and wanted not in served:
        _refuse(client, f"it serves {' and '.join(served) or 'no model'}, and generator.model is {wanted}", "which is it?")
    if not served:
        _refuse(client, "it serves no model", "start it with one")
    return wanted or served[0]


def checked_facts(client: Client, control: VllmControl, options: OpenAIGeneratorOptions) -> Facts:
    """What the server is, where a run can change its weights.

    Raises:
        ConfigError: it cannot, and what it answered, and how it has to be started.
    """
    if options.control == "none":
        _refuse(
            client,
            "generator.control is none, so nothing changes its weights, and a run changes them in every step",
            f"use control=auto and a server that was started so: {START}",
        )
    if options.control == "sglang":
        _refuse_sglang(client)
    found = control.facts()
    if isinstance(found, Reply):
        _refuse_other(client, found)
    if found.missing:
        _refuse(client, f"it is vLLM {found.vllm}, and was started without {', '.join(found.missing)}", f"start it so: {START}")
    if options.api == "tokens" and not found.scale_out:
        _refuse(
            client,
            "generator.api is tokens, and it was started without --enable-scale-out",
            "start it with it, or use completions",
        )
    if found.dtype != options.dtype:
        _refuse(
            client,
            f"its parameters are {found.dtype}, and generator.dtype is {options.dtype}",
            f"set generator.dtype={found.dtype}, or start it with --dtype {options.dtype}",
        )
    return found


def check_guarded(client: Client, facts: Facts, options: OpenAIGeneratorOptions) -> None:
    """Refuse a server on another host whose weights others could change, too.

    Raises:
        ConfigError: it answers without a key, or vLLM's own control is open.
    """
    if options.insecure or on_loopback(client.url):
        return
    if facts.dev_mode:
        _refuse(
            client,
            "VLLM_SERVER_DEV_MODE opens vLLM's own control, for which it asks nobody for a key",
            "start it without that variable (generator.insecure=true allows it)",
        )
    stranger = Client(client.url, Secret(""), client.engine, connections=1, retry_seconds=options.retry_seconds)
    try:
        open_to_all = stranger.get("/v1/models", _SECONDS).status == 200
    except ConfigError:
        open_to_all = False
    finally:
        stranger.close()
    if open_to_all:
        _refuse(
            client,
            "it asks for no key: whoever reaches it could change its weights",
            "start it with VLLM_API_KEY in its environment (generator.insecure=true allows it without)",
        )


def _refuse_other(client: Client, reply: Reply) -> NoReturn:
    answered = f"it answered {reply.status} to rlbridge's control: {reply.text}"
    kind, version = _kind(client)
    if kind == "SGLang":
        _refuse_sglang(client)
    if kind == "vLLM":
        _refuse(client, f"it is vLLM {version} without rlbridge's control in it ({answered})", f"start it so: {START}")
    _refuse(
        client,
        f"its weights cannot be changed ({answered})",
        f"a run needs a vLLM server that was started so: {START}",
    )


def _refuse_sglang(client: Client) -> NoReturn:
    _refuse(
        client,
        "an SGLang server has no route to the ranks' memory: its own take weights from disk, from a group of NCCL, or pickled",
        "use generator.backend=sglang, which starts SGLang itself and reaches its ranks",
    )


def _kind(client: Client) -> tuple[_Kind | None, str]:
    """Which server it is, where it says so."""
    told: list[tuple[_Kind, str, str]] = [
        ("SGLang", "/model_info", "model_path"),
        ("SGLang", "/get_model_info", "model_path"),
        ("vLLM", "/version", "version"),
    ]
    for kind, path, key in told:
        reply = client.get(path, _SECONDS)
        if reply.status == 200:
            try:
                said: Any = reply.json()[key]
            except (ValueError, KeyError, TypeError):
                continue
            return kind, str(said)
    return None, ""


def _refuse(client: Client, what: str, todo: str) -> NoReturn:
    raise ConfigError(f"the server at {client.url} cannot be used: {what}", todo=todo, role="generator", rank=client.engine)
