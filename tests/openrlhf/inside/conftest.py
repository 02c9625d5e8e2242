"""The variables of the environment, for those who run these tests without rlbridge having set them."""

from __future__ import annotations

import os

from rlbridge_openrlhf.environment import OPENRLHF

for name, value in {**OPENRLHF.variables, "UCX_NET_DEVICES": "lo", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile torch and DeepSpeed anew
