"""What vLLM calls in each of its processes, before it makes anything: the entry point `vllm.general_plugins`."""

from __future__ import annotations

import os

from rlbridge_vllm.processes import ACTOR_VARIABLE, die_with_parent
from rlbridge_vllm.tail import LOG_VARIABLE, keep_log

TRANSFER_BACKEND = "rlbridge"


def register() -> None:
    """Make rlbridge's weight transfer known; in a process of one of our engines, bind it to the engine's fate."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, "rlbridge_vllm.streamed", "ReloadEngine")
    if ACTOR_VARIABLE not in os.environ:
        return
    if os.environ[ACTOR_VARIABLE] != str(os.getpid()):
        die_with_parent()
    if log := os.environ.get(LOG_VARIABLE):
        keep_log(log)
    if current_platform.is_cpu():
        from rlbridge_vllm import cpu

        cpu.apply()
