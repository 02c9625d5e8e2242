"""What rlbridge adds to a vLLM server: `vllm serve --middleware rlbridge_openai.vllm_server.Control`.

Routes under /v1/rlbridge, which vLLM's key guards, carry the calls of a sync to the subscriber in each rank
(`--worker-extension-cls rlbridge_vllm.worker.WorkerExtension`) as bytes. vLLM's own routes for this need VLLM_SERVER_DEV_MODE,
take no bytes, and are open to whoever reaches the port, with a key or without.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import Any

from rlbridge.errors import DeadlineError, SyncError
from rlbridge.sync.messages import ASIDE, Nothing, longest_wait, pack, unpack
from rlbridge_openai.messages import Facts, Open, Opened
from rlbridge_openai.routes import App, Message, Receive, Send, Session, add_routes, naming

EXTENSION = "rlbridge_vllm.worker.WorkerExtension"
PROCESSOR = "rlbridge_vllm.logprobs:Tempered"

_WITH_KEY = "start it with VLLM_API_KEY in its environment"
_POLL_SECONDS = (0.0005, 0.02)


class Control:
    """The middleware: adds its routes to vLLM's application, behind vLLM's own checks, and names the session in each answer."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._calls: _Calls | None = None
        self._session = Session()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection, or the application's start."""
        if self._calls is None and "app" in scope:
            state = scope["app"].state
            self._calls = _Calls(self._session, state)
            add_routes(scope["app"], self._session, self._calls.answer, lambda: _has_key(state.args), _WITH_KEY)
        await self._app(scope, receive, naming(send, self._session))


def _has_key(arguments: Any) -> bool:
    return bool(getattr(arguments, "api_key", None) or os.environ.get("VLLM_API_KEY"))


class _Calls:
    """What an engine may ask of its server."""

    def __init__(self, session: Session, state: Any) -> None:
        self._session, self._state = session, state
        self._opening = asyncio.Lock()
        self._opened = False
        self._over: list[int] = []

    async def answer(self, call: str, method: str, query: dict[str, str], body: bytes) -> object:
        engine, seconds = self._state.engine_client, float(query.get("seconds", "300"))
        match call:
            case "ranks":
                return await self._ranks(engine, method, body, seconds)
            case "facts":
                return _facts(self._state)
            case "open":
                async with self._opening:
                    self._session.renew()  # first: nobody else's call comes in between
                    return Opened(self._session.name, await self._open(engine, unpack(body, Open), seconds))
            case "pause":
                return await self._pause(engine, query["mode"], seconds)
            case "resume":
                await engine.resume_generation()
            case "drop_caches":
                return await self._drop_caches(engine)
            case "version":
                await engine.update_weight_version(query["version"])
            case "score_at":
                temperature = float(query["temperature"]) if query.get("temperature") else None
                await _asked(engine, "rlbridge_score_at", seconds, temperature)
            case other:
                raise SyncError(f"the server has no call {other!r}: is its rlbridge another version?", role="generator")
        return Nothing()

    async def _open(self, engine: Any, message: Open, seconds: float) -> list[bytes]:
        """Subscribers of their own for who comes.

        What the last run has left is ended: its requests, its pause and its epoch. Its weights go, too: how a rank takes
        weights is found out by comparing its parameters with the checkpoint that they were loaded from.
        """
        if self._opened:
            await asyncio.wait_for(engine.engine_core.pause_scheduler_async(mode="abort", clear_cache=False), seconds)
        if await engine.is_paused():
            await engine.resume_generation()
        if self._opened:
            await self._ranks(engine, "close", pack([pack(Nothing())]), seconds)
            await _asked(engine, "rlbridge_score_at", seconds, None)
            await _asked(engine, "reload_weights", seconds)
            await self._drop_caches(engine)
        path = engine.vllm_config.model_config.model
        replies = await _asked(engine, "rlbridge_open", seconds, message.engine, message.install, path)
        self._opened = True
        await engine.update_weight_version("0")
        return replies

    async def _drop_caches(self, engine: Any) -> bool:
        await engine.reset_encoder_cache()
        return bool(await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True))

    async def _pause(self, engine: Any, mode: str, seconds: float) -> Nothing:
        session = self._session.name
        try:
            # Not `pause_generation`: from vLLM 0.33 on that refuses the requests that come meanwhile.
            await asyncio.wait_for(engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=False), seconds)
        except TimeoutError:
            if self._session.name == session:  # else it would end the pause of who came meanwhile
                await engine.resume_generation()
            raise DeadlineError(
                f"requests still ran {seconds:g} s after the pause ({mode}) had begun: the server goes on",
                role="generator",
                todo="the limit is generator.answer_seconds; are requests of others on this server?",
            ) from None
        return Nothing()

    async def _ranks(self, engine: Any, method: str, payload: bytes, seconds: float) -> list[bytes]:
        """`Subscriber.handle` in every rank: between two steps of the engine, or beside them."""
        if method not in ASIDE:
            return await _asked(engine, "rlbridge_handle", seconds, method, payload)
        seconds += longest_wait(method, payload)
        ticket, limit = secrets.randbits(62), time.monotonic() + seconds
        over, self._over = self._over, []
        await _asked(engine, "rlbridge_begin", seconds, ticket, method, payload, over)
        try:
            wait, longest = _POLL_SECONDS
            while time.monotonic() < limit:
                await asyncio.sleep(wait)
                wait = min(wait * 1.5, longest)
                answers = await _asked(engine, "rlbridge_poll", seconds, ticket)
                if None not in answers:
                    return list(answers)
        finally:
            self._over.append(ticket)
        raise DeadlineError(f"a rank did not answer {method!r} within {seconds:g} s", role="generator", phase=method)


async def _asked(engine: Any, method: str, seconds: float, *args: object) -> list[Any]:
    """What a method of the worker extension returns on each rank.

    Without vLLM's own timeout: after one, the next call would read the late answers of this one.
    """
    try:
        found: list[Any] = await asyncio.wait_for(engine.collective_rpc(method, args=args), seconds)
    except TimeoutError:
        raise DeadlineError(
            f"the ranks did not answer {method!r} within {seconds:g} s",
            role="generator",
            phase=method,
            todo="is the server overloaded? the limit is generator.answer_seconds",
        ) from None
    return found


def _facts(state: Any) -> Facts:
    import vllm

    config, arguments = state.engine_client.vllm_config, state.args
    model = config.model_config
    return Facts(
        model=str(model.model),
        server="vLLM",
        release=str(vllm.__version__),
        max_model_len=int(model.max_model_len),
        vocabulary=int(model.get_vocab_size()),
        dtype=str(model.dtype).removeprefix("torch."),
        stop_ids=_stop_ids(model),
        apis=["completions", *(["tokens"] if _has_tokens_api(arguments) else [])],
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"),
        missing=list(_missing(config, arguments)),
    )


def _has_tokens_api(arguments: Any) -> bool:
    return bool(getattr(arguments, "enable_scale_out", False) or getattr(arguments, "tokens_only", False))


def _missing(config: Any, arguments: Any) -> list[str]:
    """What the server was not started with, in the words of its command line."""
    model, parallel = config.model_config, config.parallel_config
    transfer = getattr(config, "weight_transfer_config", None)
    asked = {
        f"--worker-extension-cls {EXTENSION}": parallel.worker_extension_cls == EXTENSION,
        f"--logits-processors {PROCESSOR}": PROCESSOR in [str(p) for p in model.logits_processors or ()],
        "--logprobs-mode processed_logits": str(model.logprobs_mode) == "processed_logits",
        """--weight-transfer-config '{"backend": "rlbridge"}'""": getattr(transfer, "backend", None) == "rlbridge",
        "--api-server-count 1": (getattr(arguments, "api_server_count", None) or 1) == 1,
        "--data-parallel-size 1": parallel.data_parallel_size == 1,
        "--no-enable-eplb": not getattr(parallel, "enable_eplb", False),
        "VLLM_USE_V2_MODEL_RUNNER=0": os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0",
    }
    return [flag for flag, there in asked.items() if not there]


def _stop_ids(model: Any) -> list[int]:
    """The model's own end-of-sequence tokens."""
    found = (model.try_get_generation_config() or {}).get("eos_token_id")
    found = getattr(model.hf_config, "eos_token_id", None) if found is None else found
    return sorted(found) if isinstance(found, list) else [] if found is None else [found]
