"""The variables of the environment, for those who run these tests without rlbridge having set them."""

from __future__ import annotations

import os

from rlbridge_sglang.cpu_environment import SGLANG_CPU

for name, value in {**SGLANG_CPU.variables, "UCX_NET_DEVICES": "lo", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile torch and SGLang anew
