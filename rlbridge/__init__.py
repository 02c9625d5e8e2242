"""rlbridge: trainer, generator and transport of an RL post-training run, each swapped by its name."""

from __future__ import annotations

import pluggy

from rlbridge.backend import Backend, Capability
from rlbridge.environment import Environment

__version__ = "0.1.0"
__all__ = ["Backend", "Capability", "Environment", "__version__", "hookimpl"]

hookimpl = pluggy.HookimplMarker("rlbridge")
"""Marks a function of a plugin module as the implementation of one of rlbridge's hooks (see rlbridge.hookspecs)."""
