"""verl's platform "cpu": what verl asks of a device, where there is none. For tests and development.

It is never found by itself: a driver without a GPU of its own may well run a job on GPUs. `VERL_PLATFORM=cpu` chooses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

PLATFORM_VARIABLE = "VERL_PLATFORM"
NAME = "cpu"
RAY_RESOURCE = "verl_cpu"
"""Ray resource of a worker: verl's placement groups ask for CPUs besides, and one name cannot stand for both."""


def register() -> None:
    """Make the platform known to verl. A second time changes nothing."""
    if PlatformRegistry.get(NAME) is None:
        PlatformRegistry.register(platform=NAME)(CpuPlatform)


def register_engines() -> None:
    """Let verl's FSDP engines be found for this platform. A second time changes nothing."""
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    known = EngineRegistry._engines["language_model"]["fsdp2"]
    if NAME not in known:
        EngineRegistry.register("language_model", "fsdp2", device=NAME)(FSDPEngineWithLMHead)


class _DeviceModule(ModuleType):
    """torch.cpu, and what verl asks torch.cuda for besides: memory that nobody counts, and the one random state."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> torch.device:
        return torch.device(NAME)

    def device_count(self) -> int:
        return 1

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def ipc_collect(self) -> None:
        """Nothing is shared."""

    def reset_peak_memory_stats(self, *_: Any) -> None:
        """Nothing is counted."""

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 0, 1  # free of total; verl divides by the latter

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def _bytes(self, *_: Any) -> int:
        return 0

    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _bytes


_device_module = _DeviceModule("rlbridge_verl_cpu")


class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """A host without accelerators."""

    device_name = NAME
    vendor_name = NAME
    device_module = _device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # not to be chosen by itself

    def current_device(self) -> torch.device:
        return torch.device(NAME)  # verl moves tensors there: the number 0 would be the first GPU

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs aside."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There is no allocator to set."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "RLBRIDGE_VERL_VISIBLE_CPUS"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """There is no device to profile."""

    def profiler_stop(self) -> None:
        """There is no device to profile."""

    def ray_resource_name(self) -> str:
        return RAY_RESOURCE

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        """There is no CUDA."""
