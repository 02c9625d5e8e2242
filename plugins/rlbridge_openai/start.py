"""What a server has to be before a run begins: asked for at the start, and refused there with what to do."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from rlbridge.errors import ConfigError
from rlbridge_openai.client import Client, Reply
from rlbridge_openai.control import ServerControl
from rlbridge_openai.messages import Facts
from rlbridge_openai.options import OpenAIGeneratorOptions
from rlbridge_openai.secret import Secret, on_loopback

START = (
    "VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --middleware rlbridge_openai.vllm_server.Control"
    " --worker-extension-cls rlbridge_vllm.worker.WorkerExtension --logits-processors rlbridge_vllm.logprobs:Tempered"
    """ --logprobs-mode processed_logits --weight-transfer-config '{"backend": "rlbridge"}' --enable-scale-out"""
)
"""How a vLLM is started that can be used."""

START_SGLANG = "python -m rlbridge_openai.sglang_server --model-path MODEL"
"""How an SGLang is started that can be used; further arguments are those of sglang.launch_server."""

_KEY = {"vLLM": "VLLM_API_KEY in its environment", "SGLang": "--api-key"}
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


def checked_facts(client: Client, control: ServerControl, options: OpenAIGeneratorOptions) -> Facts:
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
    found = control.facts()
    if isinstance(found, Reply):
        _refuse_other(client, found)
    if options.control not in ("auto", found.server.lower()):
        _refuse(client, f"it is {found.server}, and generator.control is {options.control}", "use control=auto")
    start = START_SGLANG if found.server == "SGLang" else START
    if found.missing:
        _refuse(
            client,
            f"it is {found.server} {found.release}, and was started without {', '.join(found.missing)}",
            f"start it so: {start}",
        )
    if options.api not in ("auto", *found.apis):
        what = "it was started without --enable-scale-out" if options.api == "tokens" else f"{found.server} has not that one"
        _refuse(client, f"generator.api is {options.api}, and {what}", "use api=auto, or start it with what the api needs")
    if found.server == "SGLang" and options.install == "streamed":
        _refuse(client, "generator.install is streamed, and SGLang's parameters are written in place", "use install=auto")
    if found.dtype != options.dtype:
        _refuse(
            client,
            f"its parameters are {found.dtype}, and generator.dtype is {options.dtype}",
            f"set generator.dtype={found.dtype}, or start it with --dtype {options.dtype}",
        )
    return found


def chosen_api(facts: Facts, options: OpenAIGeneratorOptions) -> str:
    """What `generator.api` comes to on this server; auto is what tells the version of each token, where there is such."""
    if options.api != "auto":
        return options.api
    return "tokens" if "tokens" in facts.apis else "completions"


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
            f"start it with {_KEY[facts.server]} (generator.insecure=true allows it without)",
        )


def _refuse_other(client: Client, reply: Reply) -> NoReturn:
    answered = f"it answered {reply.status} to rlbridge's control: {reply.text}"
    kind, version = _kind(client)
    if kind == "SGLang":
        _refuse(
            client,
            f"it is an SGLang server without rlbridge's control in it ({answered})",
            f"start it so: {START_SGLANG}, or use generator.backend=sglang, which starts SGLang itself",
        )
    if kind == "vLLM":
        _refuse(client, f"it is vLLM {version} without rlbridge's control in it ({answered})", f"start it so: {START}")
    _refuse(
        client,
        f"its weights cannot be changed ({answered})",
        f"a run needs a server that was started so: {START}, or so: {START_SGLANG}",
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
