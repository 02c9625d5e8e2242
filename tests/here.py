"""A party of a session in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Here:
    """What answers is a function of (method, payload)."""

    actor = None

    def __init__(self, name: str, handle: Callable[..., list[bytes]]) -> None:
        self.name, self._handle, self._pool = name, handle, ThreadPoolExecutor(4)

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        return self._pool.submit(self._handle, method, payload)

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        raise NotImplementedError
