"""Real servers, each in a process of its own, with a small model made on the spot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from rlbridge.plugins import registry
from rlbridge.roles.generator import GeneratorContext
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_openai.generator import OpenAIGenerator
from rlbridge_openai.options import OpenAIGeneratorOptions
from tests.here import Here
from tests.models import tiny_qwen3
from tests.openai.trainer import change, load, start

KEY = "sk-of-the-tests-0123456789"
START_SECONDS = 240.0
LONGEST = 128

CONTROL = [
    *("--middleware", "rlbridge_openai.vllm_server.Control"),
    *("--worker-extension-cls", "rlbridge_vllm.worker.WorkerExtension"),
    *("--logits-processors", "rlbridge_vllm.logprobs:Tempered"),
    *("--logprobs-mode", "processed_logits"),
    *("--weight-transfer-config", '{"backend": "rlbridge"}'),
    "--enable-scale-out",
]
"""What docs/openai.md tells to start it with."""


class ServerProcess(ABC):
    """A server with rlbridge's control in it, unless it is `plain`."""

    environment: str
    kind: str

    def __init__(self, python: Path, directory: Path, *, plain: bool = False) -> None:
        self.model = directory / "model"
        if not self.model.exists():
            tiny_qwen3(self.model, head_dim=32)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"server-{self.port}.log"
        self.python, self.plain = python, plain

    @abstractmethod
    def command(self) -> list[str]:
        """What is run, after the interpreter."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """What the environment has to say."""

    def __enter__(self) -> Self:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **self.variables()}
        with self.log.open("wb") as log:
            command = [str(self.python), *self.command()]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End its processes at once: the kernel ends the others with the first."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def _wait(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(f"the server did not start; its log ends:\n{self.log.read_text(errors='replace')[-4000:]}")


class VllmProcess(ServerProcess):
    """vLLM. The variables of rlbridge's own vLLM generator let its processes be forked, and end with this one."""

    environment, kind = "vllm-cpu", "vLLM"

    def command(self) -> list[str]:
        said = ["--model", str(self.model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST), "--generation-config", "vllm"]
        control = CONTROL[4:6] if self.plain else CONTROL
        return ["-m", "vllm.entrypoints.openai.api_server", *said, *small, *control]

    def variables(self) -> dict[str, str]:
        return {
            "RLBRIDGE_VLLM_ACTOR": str(os.getpid()),
            "RLBRIDGE_VLLM_EAGER": "1",
            "RLBRIDGE_VLLM_PREPACK": "0",
            "VLLM_API_KEY": KEY,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }


class SglangProcess(ServerProcess):
    """SGLang, of two ranks."""

    environment, kind = "sglang-cpu", "SGLang"

    def command(self) -> list[str]:
        said = ["--model-path", str(self.model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        small = ["--dtype", "float32", "--context-length", str(LONGEST), "--max-total-tokens", "8192", "--device", "cpu"]
        if self.plain:
            own = ["--attention-backend", "torch_native", "--disable-cuda-graph", "--disable-overlap-schedule"]
            return ["-m", "sglang.launch_server", *said, *small, *own, "--skip-server-warmup", "--api-key", KEY]
        ranks = ["--tp-size", "2", "--skip-server-warmup", "--api-key", KEY]
        return ["-m", "rlbridge_openai.sglang_server", *said, *small, *ranks]

    def variables(self) -> dict[str, str]:
        return dict(registry().environment(self.environment).variables)


made: list[OpenAIGenerator] = []
"""Those that the test has set up, to be closed after it."""


def generator_of(url: str, *, model_path: str = "", engine: int = 0, **options: Any) -> OpenAIGenerator:
    """A generator that is set up."""
    chosen = OpenAIGeneratorOptions(**{"backend": "openai", "url": url, "retry_seconds": 2.0, **options})
    generator = OpenAIGenerator()
    made.append(generator)
    generator.setup(GeneratorContext(engine, 1, "cpu", model_path, 0, False, chosen.model_dump()), chosen)
    return generator


class Bridge:
    """A model that a test may change, and an engine on the server, with a session and NIXL between them."""

    def __init__(self, server: ServerProcess, **options: Any) -> None:
        self.model, self._trainer = load(server.model), start(server.model)
        self.generator = generator_of(server.url, model_path=str(server.model), **options)
        self.engine = Engine("generator[0]", self.generator)
        self._sessions: list[SyncSession] = []

    def change(self, seed: int) -> None:
        """Move every weight of the model."""
        change(self.model, seed)
        self._trainer.do("change", seed)

    def session(self, **options: Any) -> SyncSession:
        engine = Here("generator[0]", self.engine.handle)
        spec = TransportSpec("nixl", {"backend": "nixl", "net_devices": "lo"})
        session = SyncSession([self._trainer], [engine], spec, SyncOptions(**options))
        self._sessions.append(session)
        return session

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self.generator.close()
        self._trainer.stop()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
