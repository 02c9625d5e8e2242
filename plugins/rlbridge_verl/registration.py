"""What verl loads in each of its processes, through the entry-point group `verl.plugins`: names, and no framework of ours."""

from __future__ import annotations

from rlbridge_verl import cpu_platform

cpu_platform.register()
