"""verl as a trainer, and rlbridge as the wire of a job that verl runs."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, Environment, hookimpl

TESTED = "verl>=0.9,<0.10"

_OF_ITS_JOBS = ("cachetools", "fastapi", "pyzmq", "uvicorn")
"""What a job that verl runs imports besides, and verl leaves to its extras; the trainer needs none of it."""


@hookimpl
def rlbridge_trainers() -> Sequence[Backend]:
    """The backend `verl`."""
    return [
        Backend(
            name="verl",
            load="rlbridge_verl.trainer:VerlTrainer",
            options="rlbridge_verl.options:VerlTrainerOptions",
            summary="verl's own engines and loss: FSDP2 on CPU or CUDA, Megatron on CUDA.",
            extra="verl",
            requires=("torch", "verl"),
            capabilities=frozenset({Capability.SHARDED, Capability.MULTI_RANK, Capability.LIVE_STORAGE, Capability.CUDA}),
            environments=("verl",),
            tested=(TESTED,),
        )
    ]


@hookimpl
def rlbridge_environments() -> Sequence[Environment]:
    """verl, with what it needs of a machine."""
    return [
        Environment(
            name="verl",
            summary="verl 0.9, for CPU or CUDA as torch's wheel is.",
            lock="rlbridge_verl:verl.lock",
            requirements=(
                "verl==0.9.1",
                "omegaconf>=2.3",
                "torch==2.13.0",
                "tensordict==0.10.0",
                *_OF_ITS_JOBS,
                "rlbridge[conform,native,nixl]",
            ),
            resolved=("torch",),
            variables={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            modules=("verl.workers.engine", "ray", "nixl", "rlbridge_verl.trainer"),
        )
    ]
