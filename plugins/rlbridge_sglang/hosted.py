"""An engine in a server that SGLang itself runs: its ranks with subscribers, and what a run may ask of it."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlbridge.errors import ConfigError, DeadlineError, RlbridgeError, SyncError
from rlbridge.sync.messages import Nothing, pack
from rlbridge_sglang.channel import RankClient, socket_path
from rlbridge_sglang.control import Control
from rlbridge_sglang.engine_loop import EngineLoop
from rlbridge_sglang.launch import (
    CPU_ARGUMENTS,
    CPU_VARIABLES,
    OF_MOE_RUNNERS,
    engine_class,
    has_tokenizer,
    is_plain_moe,
    share_cores,
)
from rlbridge_sglang.options import RESERVED
from rlbridge_sglang.rank_process import RankSpec, rank_name, run_rank
from rlbridge_sglang.ranks import Ranks

_FIXED = (
    "pp_size",
    "dp_size",
    "nnodes",
    "use_ray",
    "tokenizer_worker_num",
    "speculative_algorithm",
    "disaggregation_mode",
    "enable_lora",
    "enable_eplb",
    "weight_cache_mode",
    "custom_weight_loader",
    "hicache_storage_backend",
    "enable_lmcache",
    "lora_paths",
    "admin_api_key",
    "grpc_mode",
    "smg_grpc_mode",
    "encoder_only",
)
"""Arguments that nobody may have given."""

_WHY = {
    **RESERVED,
    "admin_api_key": "whoever has the other key could change the weights; there is one key, --api-key",
    **dict.fromkeys(("grpc_mode", "smg_grpc_mode", "encoder_only"), "it is a server of HTTP that generates"),
}

_LOOK_SECONDS = 0.01


class HostedEngine:
    """What a run may ask of the engine. Calls come from threads that are not the server's own.

    Args:
        arguments: SGLang's.
        directory: A private directory for the ranks' sockets.
    """

    def __init__(self, arguments: Any, directory: str) -> None:
        self._arguments, self._directory = arguments, directory
        self._engine = SimpleNamespace()
        self._loop: EngineLoop | None = None
        self._opened: _Opened | None = None
        self._broken = ""
        self._opening = threading.Lock()

    def attach(self, manager: Any, ports: Any) -> None:
        """Called when SGLang's processes are there."""
        self._engine.tokenizer_manager, self._engine.ports = manager, ports

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called when the server runs, on this loop."""
        if self._loop is None:
            self._loop = EngineLoop("the server", lambda: None, loop)  # SGLang's own watchdog ends the server with its ranks

    def has_key(self) -> bool:
        """Whether the server asks for one."""
        return bool(self._arguments.api_key)

    def facts(self) -> dict[str, Any]:
        """What the server is."""
        import sglang

        manager = self._engine.tokenizer_manager
        return {
            "model": str(self._arguments.model_path),
            "release": str(sglang.__version__),
            "max_model_len": int(manager.context_len),
            "vocabulary": int(manager.model_config.vocab_size),
            "dtype": str(manager.model_config.dtype).removeprefix("torch."),
        }

    def open(self, engine: str, seconds: float) -> list[bytes]:
        """Subscribers of their own for who comes.

        What the last run has left is ended: its requests, its epoch, its weights and its pause, in that order.

        Args:
            engine: Its name in the session.
            seconds: Longest that this, and any call of it, may take.

        Raises:
            SyncError: the engine is in no state that it could come back from.
        """
        with self._opening:
            return self._open(engine, seconds)

    def _open(self, engine: str, seconds: float) -> list[bytes]:
        assert self._loop is not None
        if self._broken:
            raise SyncError(self._broken, role="generator", todo="start the server again")
        if not hasattr(self._engine, "collective_rpc"):
            _connect(self._engine)
        index = int(engine.removeprefix("generator[").removesuffix("]"))
        control = Control(self._engine, self._loop, seconds)
        clients = [
            RankClient(rank_name(index, rank), socket_path(self._directory, rank), lambda: "")
            for rank in range(self._arguments.tp_size)
        ]
        ranks = Ranks(clients, functools.partial(self._run, seconds), seconds)
        control.limit = time.monotonic() + seconds
        opened = _Opened(control, ranks, seconds)
        if self._opened is not None:
            self._quiet(opened, "abort")
            control.end_update()
            ranks.call("close", pack([pack(Nothing())]))
            control.load_again(str(self._arguments.model_path))
        replies = ranks.call("subscribe", pack(index))
        control.stamp(0, anyway=True)
        if self._opened is not None:
            control.flush()
            control.let_go()
        control.limit = None
        self._opened = opened
        return replies

    def ranks(self, method: str, payload: bytes) -> list[bytes]:
        """`Subscriber.handle` in every rank."""
        opened = self._session()
        return opened.ranks.on_each(method, payload, opened.control.updating)

    def pause(self, mode: str) -> None:
        """Requests that come wait; those that run end by themselves (wait), with what they have (abort), or are held (keep).

        Raises:
            DeadlineError: some still ran at the end of the time: the server goes on.
        """
        opened = self._session()
        was_closed = opened.control.is_closed
        try:
            self._quiet(opened, mode)
        except BaseException:
            if not was_closed:  # by a pause after which the weights may be torn
                with contextlib.suppress(RlbridgeError):  # the first error is the one to tell
                    opened.control.let_go()
            raise

    def resume(self) -> None:
        """Go on."""
        self._session().control.let_go()

    def drop_caches(self) -> bool:
        """Forget all keys and values."""
        self._session().control.flush()
        return True

    def set_version(self, version: int) -> None:
        """Stamp tokens with it from now on."""
        self._session().control.stamp(version)

    def _quiet(self, opened: _Opened, mode: str) -> None:
        """No request makes a token after this."""
        control, limit = opened.control, time.monotonic() + opened.seconds
        control.close_door()
        while mode != "keep" and control.is_running():
            if time.monotonic() > limit:
                raise DeadlineError(
                    f"requests still ran {opened.seconds:g} s after the pause ({mode}) had begun: the server goes on",
                    role="generator",
                    todo="the limit is generator.answer_seconds; are requests of others on this server?",
                )
            if mode == "abort":
                control.abort()
            time.sleep(_LOOK_SECONDS)
        control.hold()

    def _session(self) -> _Opened:
        if self._opened is None:
            raise SyncError("nobody has opened this server", role="generator", todo="is the caller's rlbridge another version?")
        return self._opened

    def _run(self, seconds: float, ticket: int) -> None:
        """Let SGLang call `rlbridge_run` in every rank."""
        assert self._loop is not None
        try:
            self._loop.run(lambda: self._engine.collective_rpc("rlbridge_run", ticket=ticket), seconds, "rpc")
        except DeadlineError as error:  # somebody still waits for the answer: it would be taken for that of the next call
            self._broken = error.what
            raise


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Of the run that has come last."""

    control: Control
    ranks: Ranks
    seconds: float


def serve(command_line: Sequence[str], add_control: Callable[[Any, HostedEngine], None]) -> None:
    """Run SGLang's server until it is ended.

    Args:
        command_line: The arguments of `sglang.launch_server`.
        add_control: Puts the control of the engine into the server's application.

    Raises:
        ConfigError: an argument that a run cannot do with.
        PluginError: SGLang is too old.
    """
    arguments = _arguments(list(command_line))
    engine_class()
    directory = tempfile.mkdtemp(prefix="rlbridge-sglang-")  # readable by this user alone
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils import kill_process_tree

    hosted = HostedEngine(arguments, directory)
    add_control(http_server.app, hosted)
    http_server.Engine = _attached(http_server.Engine, hosted)
    spec = RankSpec(0, directory, seeded=True)
    try:
        http_server.launch_server(arguments, run_scheduler_process_func=functools.partial(run_rank, spec))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _arguments(command_line: list[str]) -> Any:
    """SGLang's own of a command line; before it those that a run needs, and that a CPU has kernels for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    parser.add_argument("--model-path", "--model", default="")
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1)
    seen, _ = parser.parse_known_args(command_line)
    named = {word.partition("=")[0] for word in command_line}
    if "--config" in named:
        raise ConfigError("--config cannot be used here", todo="give the server its arguments one by one", role="generator")
    ours = ["--sampling-backend", "pytorch"]
    if Path(seen.model_path).is_dir() and "--tokenizer-path" not in named and not has_tokenizer(seen.model_path):
        ours.append("--skip-tokenizer-init")
    if seen.device == "cpu":
        for name, value in CPU_VARIABLES.items():
            os.environ.setdefault(name, value)
        share_cores(seen.tensor_parallel_size)
        for name, value in CPU_ARGUMENTS.items():
            ours += [_flag(name), *([] if value is True else [str(value)])]
    elif not {_flag(name) for name in OF_MOE_RUNNERS} & named and is_plain_moe(seen.model_path):
        ours += ["--moe-runner-backend", "triton"]
    from sglang.srt.server_args import prepare_server_args

    usual = prepare_server_args(["--model-path", seen.model_path or "."])  # before the other: the last one made counts
    found = prepare_server_args([*ours, *command_line])
    given = [name for name in _FIXED if getattr(found, name, None) != getattr(usual, name, None)]
    if (found.device, found.tp_size, found.model_path) != (seen.device, seen.tensor_parallel_size, seen.model_path):
        raise ConfigError(
            "an argument is abbreviated", todo="write --model-path, --tp-size and --device in full", role="generator"
        )
    if given:
        raise ConfigError(
            "; ".join(f"{name} cannot be set: {_WHY[name]}" for name in given),
            todo="start the server without",
            role="generator",
        )
    if found.sampling_backend != "pytorch":
        raise ConfigError("only the sampling backend pytorch samples from seeds", todo="leave it out", role="generator")
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _attached(base: Any, hosted: HostedEngine) -> Any:
    """`base`, whose processes it tells."""

    class AttachedEngine(base):  # type: ignore[misc]
        @classmethod
        def _launch_subprocesses(cls, *args: Any, **kwargs: Any) -> Any:
            found = super()._launch_subprocesses(*args, **kwargs)
            hosted.attach(found[0], next(part for part in found if hasattr(part, "rpc_ipc_name")))
            return found

    return AttachedEngine


def _connect(engine: SimpleNamespace) -> None:
    """Make of what a server has what `collective_rpc` takes for an engine."""
    import zmq
    from sglang.srt.entrypoints import engine as engines

    engine.send_to_rpc = engines.get_zmq_socket(zmq.Context(1), zmq.DEALER, engine.ports.rpc_ipc_name, True)
    engine.collective_rpc = functools.partial(engines.Engine.collective_rpc, engine)
