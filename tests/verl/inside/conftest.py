"""The variables of the environment, for those who run these tests without rlbridge having set them."""

from __future__ import annotations

import os

from rlbridge_verl import rlbridge_environments

(_environment,) = rlbridge_environments()
for name, value in {**_environment.variables, "UCX_NET_DEVICES": "lo", "HF_HUB_OFFLINE": "1", "VERL_PLATFORM": "cpu"}.items():
    os.environ.setdefault(name, value)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile torch and verl anew
