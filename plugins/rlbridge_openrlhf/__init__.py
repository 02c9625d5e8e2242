"""OpenRLHF as a trainer: its actor, loss and DeepSpeed strategy, with the environment that it runs in."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, Environment, hookimpl
from rlbridge_openrlhf.environment import OPENRLHF

TESTED = ("openrlhf>=0.11.2,<0.12", "deepspeed>=0.19,<0.20")


@hookimpl
def rlbridge_trainers() -> Sequence[Backend]:
    """The backend `openrlhf`."""
    return [
        Backend(
            name="openrlhf",
            load="rlbridge_openrlhf.trainer:OpenRLHFTrainer",
            options="rlbridge_openrlhf.options:OpenRLHFTrainerOptions",
            summary="OpenRLHF's actor and loss, sharded by DeepSpeed's ZeRO stage 2 or 3; CPU or CUDA.",
            requires=("torch", "deepspeed", "openrlhf"),
            capabilities=frozenset({Capability.SHARDED, Capability.MULTI_RANK, Capability.LIVE_STORAGE, Capability.CUDA}),
            environments=(OPENRLHF.name,),
            tested=TESTED,
        )
    ]


@hookimpl
def rlbridge_environments() -> Sequence[Environment]:
    """OpenRLHF, without the packages of its that it never imports for training."""
    return [OPENRLHF]
