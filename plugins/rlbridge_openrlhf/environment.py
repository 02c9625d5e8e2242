"""The environment of OpenRLHF: its own pins, but for those that keep it from sharing a machine with anything else."""

from __future__ import annotations

from rlbridge import Environment

_IMPORTED = (
    "accelerate",
    "aiohttp",
    "datasets",
    "einops",
    "packaging",
    "peft",
    "pillow",
    "psutil",
    "pylatexenc",
    "requests",
    "sympy",
    "torchdata",
    "tqdm",
)
"""What its actor, strategy and training step import; pillow is not among what OpenRLHF says that it requires."""

OPENRLHF = Environment(
    name="openrlhf",
    summary="OpenRLHF 0.11 with DeepSpeed 0.19, for CPU or CUDA as torch's wheel is.",
    lock="rlbridge_openrlhf:openrlhf.lock",
    requirements=(
        "deepspeed==0.19.6",
        "torch==2.13.0",
        "transformers==5.15.0",
        *_IMPORTED,
        "rlbridge[conform,native,nixl]",
    ),
    # It pins ray 2.55, and flash-attn, which takes a CUDA compiler to install and is not called with sdpa.
    no_deps=("openrlhf==0.11.2",),
    resolved=("torch",),
    variables={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    python="3.11",  # OpenRLHF's one wheel says so, although there is only Python in it
    modules=("deepspeed", "openrlhf", "ray", "nixl", "rlbridge_conformance"),
)
