"""Start an SGLang engine with a subscriber in each of its ranks, and end it with all of its processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlbridge.errors import ConfigError, ModelError, PeerLostError, PluginError, RlbridgeError, SyncError
from rlbridge.roles.generator import GeneratorContext
from rlbridge_sglang.channel import socket_path
from rlbridge_sglang.options import SglangGeneratorOptions
from rlbridge_sglang.rank_process import RankSpec, failure_path, rank_name, run_rank

OLDEST = "0.5.21"

CPU_VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
"""SGLang's CPU path, with no compiler at run time. The ranks inherit them."""

CPU_ARGUMENTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
    "max_total_tokens": 32768,
    "max_running_requests": 64,
}
"""Kernels and sizes that a CPU has."""

CORES_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"

OF_MOE_RUNNERS = {"moe_runner_backend", "moe_a2a_backend", "quantization"}
"""Arguments that choose an MoE runner, or leave no choice of it."""

_SOCKET_PATH_BYTES = 100
_END_SECONDS = 10.0


class Launch:
    """The processes of one engine: started by `build`, watched by `lost`, ended by `close`.

    Args:
        context: What the engine was told at its start.
        options: Its options.

    Attributes:
        directory: A private directory for the ranks' sockets.
        ranks: The ranks' processes, in rank order.
        others: The engine's other processes.
    """

    def __init__(self, context: GeneratorContext, options: SglangGeneratorOptions) -> None:
        self._context, self._options = context, options
        self.ranks: Sequence[Any] = ()
        self.others: Sequence[Any] = ()
        self._engine: Any = None
        self._closed = False
        self._sockets_before = weakref.WeakSet(_sockets())
        atexit.register(self.close)  # before multiprocessing waits for the ranks to end by themselves
        self.directory = tempfile.mkdtemp(prefix="rlbridge-sglang-")  # readable by this user alone
        if len(str(socket_path(self.directory, options.tensor_parallel)).encode()) > _SOCKET_PATH_BYTES:
            path = self.directory
            self.close()
            raise ConfigError(f"no socket can be made in {path}: the path is too long", todo="set TMPDIR to a shorter one")

    def build(self) -> Any:
        """The engine, when it has loaded its model. Its processes end with the thread that calls this.

        Raises:
            PluginError: SGLang is too old.
            ConfigError: SGLang refuses an argument.
            ModelError: the model cannot be loaded.
            PeerLostError: a rank ended without a word.
        """
        if self._context.device == "cpu":
            for name, value in CPU_VARIABLES.items():
                os.environ.setdefault(name, value)
        base = engine_class()
        if self._context.device == "cpu":
            share_cores(self._options.tensor_parallel)
        arguments = engine_arguments(self._context, self._options)
        try:
            self._engine = self._watched(base)(**arguments)
        except TypeError as error:
            if "unexpected keyword argument" in str(error).lower():
                raise ConfigError(
                    f"sglang.Engine takes no such argument: {error}", todo="see generator.engine_args", role="generator"
                ) from error
            raise self._unloadable(error) from error
        except RlbridgeError:
            raise
        except Exception as error:
            raise self._unloadable(error) from error
        finally:
            if self._engine is None:
                self.close_sockets()
        self._disarm()
        return self._engine

    def lost(self) -> RlbridgeError | None:
        """What to tell of a process that is gone."""
        for rank, process in enumerate(self.ranks):
            if not process.is_alive():
                return self._gone(rank)
        for process in self.others:
            if not process.is_alive():
                return PeerLostError(
                    f"SGLang's detokenizer is gone: exit code {process.exitcode}",
                    role="generator",
                    peer=f"generator[{self._context.engine}]",
                    todo="the engine has to be started again",
                )
        return None

    def why_gone(self, rank: int) -> str:
        """What is known of a rank's end."""
        with contextlib.suppress(OSError):
            lines = failure_path(self.directory, rank).read_text().rstrip().splitlines()
            return lines[-1] if lines else ""
        process = self.ranks[rank] if rank < len(self.ranks) else None
        if process is None or process.is_alive():
            return ""
        return f"pid {process.pid} ended with {process.exitcode}"

    def close(self) -> None:
        """End every process of the engine, and remove its files. One that is still being built starts no process any more."""
        self._closed = True
        atexit.unregister(self.close)
        for process in (*self.ranks, *self.others):
            with contextlib.suppress(ValueError, OSError):
                process.kill()
        for process in (*self.ranks, *self.others):
            with contextlib.suppress(ValueError, OSError):
                process.join(_END_SECONDS)
        for path in _zmq_files(getattr(self._engine, "port_args", None)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def close_sockets(self) -> None:
        """Close what SGLang leaves open: a context of zmq that is collected as garbage waits for its sockets for ever.

        To be called when the engine's loop has ended.
        """
        zmq: Any = sys.modules.get("zmq")
        for socket in _sockets():
            if socket not in self._sockets_before and not socket.closed:
                zmq.Socket.close(socket, linger=0)  # that of asyncio would ask its loop

    def go_on(self) -> None:
        """Refuse to, if `close` was called meanwhile.

        Raises:
            SyncError: it was.
        """
        if self._closed:
            self.close()
            raise SyncError("the engine was closed before it was there", role="generator", phase="start")

    def _watched(self, base: Any) -> Any:
        """`base` with our own ranks, whose processes it tells us."""
        launch, options = self, self._options
        spec = RankSpec(self._context.engine, self.directory, seeded=options.sampling_backend == "pytorch")
        tokenizer = has_tokenizer(self._context.model_path)

        class RankedEngine(base):  # type: ignore[misc]
            run_scheduler_process_func = staticmethod(functools.partial(run_rank, spec))

            @classmethod
            def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
                launch.go_on()
                result, processes = super()._launch_scheduler_processes(*args, **kwargs)
                launch.ranks = list(processes)
                launch.go_on()
                return result, processes

            @classmethod
            def _launch_detokenizer_subprocesses(cls, *args: Any, **kwargs: Any) -> Any:
                if not tokenizer:  # the ranks answer without it
                    return [], []
                processes, names = super()._launch_detokenizer_subprocesses(*args, **kwargs)
                launch.others = list(processes)
                launch.go_on()
                return processes, names

            def shutdown(self) -> None:
                """Nothing: SGLang's own would end every child of this process, whosever it is."""

        return RankedEngine

    def _disarm(self) -> None:
        """SGLang's watchdog answers a lost child by a signal that ends this process; `lost` is what looks here."""
        atexit.unregister(self._engine.shutdown)
        watchdog = getattr(self._engine.tokenizer_manager, "_subprocess_watchdog", None)
        if watchdog is not None:
            watchdog.stop()

    def _unloadable(self, error: Exception) -> RlbridgeError:
        for rank in range(self._options.tensor_parallel):
            path = failure_path(self.directory, rank)
            if path.is_file():
                told = path.read_text().rstrip()
                cause = told.splitlines()[-1]
                return self._model_error(f"{rank_name(self._context.engine, rank)} said: {cause}").raised_by(told)
        for rank, process in enumerate(self.ranks):
            if process.exitcode is not None:
                return self._gone(rank)
        return self._model_error(f"{type(error).__name__}: {error}")

    def _model_error(self, cause: str) -> RlbridgeError:
        return ModelError(
            f"SGLang cannot load the model in {self._context.model_path}: {cause}",
            role="generator",
            rank=f"generator[{self._context.engine}]",
            phase="start",
            todo="does this SGLang know the architecture of its config.json, and is there memory for it? look at"
            " generator.engine_args, too",
        )

    def _gone(self, rank: int) -> RlbridgeError:
        name = rank_name(self._context.engine, rank)
        why = self.why_gone(rank)
        return PeerLostError(
            f"the process of {name} is gone" + (f": {why}" if why else ""),
            role="generator",
            peer=name,
            todo="the engine has to be started again; a process that ended with -9 may have been out of memory",
        )


def engine_arguments(context: GeneratorContext, options: SglangGeneratorOptions) -> dict[str, Any]:
    """What `sglang.Engine` is given.

    On a CPU it is given kernels and sizes that a CPU has. On CUDA an MoE that is not quantized is given the runner that leaves
    weights as they are loaded: what SGLang chooses on some devices moves their rows, and a sync could not write them. All else
    is the same.
    """
    arguments: dict[str, Any] = {
        "model_path": context.model_path,
        "trust_remote_code": context.trust_remote_code,
        "skip_tokenizer_init": not has_tokenizer(context.model_path),
        "device": "cpu" if context.device == "cpu" else "cuda",
        "dtype": options.dtype,
        "tp_size": options.tensor_parallel,
        "random_seed": context.seed + context.engine,
        "weight_version": "0",
        "sampling_backend": options.sampling_backend,
        "log_level": options.log_level,
        "skip_server_warmup": True,
    }
    if context.device == "cpu":
        arguments |= CPU_ARGUMENTS
    elif not OF_MOE_RUNNERS & options.engine_args.keys() and is_plain_moe(context.model_path):
        arguments["moe_runner_backend"] = "triton"
    chosen: dict[str, Any] = {
        "context_length": options.context_length,
        "mem_fraction_static": options.memory_fraction,
        "max_total_tokens": options.cache_tokens,
        "max_running_requests": options.running_requests,
        "attention_backend": options.attention_backend,
    }
    return arguments | {key: value for key, value in chosen.items() if value} | options.engine_args


def has_tokenizer(model_path: str) -> bool:
    """Whether the directory holds one; transformers makes an empty tokenizer where it does not."""
    return any(Path(model_path).glob("tokenizer*"))


def is_plain_moe(model_path: str) -> bool:
    """Whether the model has experts, and its weights are not quantized."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return False  # no model; SGLang says so
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # that of the text, for example
    quantized = any(part.get("quantization_config") or part.get("compression_config") for part in parts)
    return not quantized and any(value for part in parts for key, value in part.items() if "experts" in key)


def engine_class() -> Any:
    """SGLang's engine.

    Raises:
        PluginError: SGLang is too old.
    """
    import sglang
    from sglang.srt.entrypoints.engine import Engine

    if not hasattr(Engine, "begin_weight_update") or not hasattr(Engine, "run_scheduler_process_func"):
        raise PluginError(
            f"SGLang {getattr(sglang, '__version__', '?')} is too old: it has no begin_weight_update",
            role="generator",
            todo=f"install sglang>={OLDEST}",
        )
    return Engine


def share_cores(ranks: int) -> None:
    """Give each rank cores of its own: SGLang has one for each NUMA node, and starts no more of them unless it is told."""
    from sglang.srt.utils.common import get_cpu_ids_by_node

    if ranks > len(get_cpu_ids_by_node()):
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
        os.environ.setdefault(CORES_VARIABLE, "|".join(",".join(map(str, share)) for share in shares))


def _sockets() -> list[Any]:
    """SGLang's sockets in this process."""
    zmq = sys.modules.get("zmq")
    return [] if zmq is None else [thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Socket)]


def _zmq_files(port_args: Any) -> list[Path]:
    """The files that SGLang made for its sockets, and leaves behind."""
    values = [value for value in vars(port_args).values() if isinstance(value, str)] if port_args is not None else []
    return [Path(value.removeprefix("ipc://")) for value in values if value.startswith("ipc:///")]
