"""What verl loads in each of its processes, through the entry-point group `verl.plugins`.

verl hides what is raised here, so a checkpoint engine that cannot be imported is left as such with verl, which says why to
whoever asks for it. What else it needs, it checks when it is made.
"""

from __future__ import annotations

from rlbridge_verl import cpu_platform

cpu_platform.register()

try:
    from rlbridge_verl.wire import checkpoint_engine  # noqa: F401  (it registers itself)
except ImportError as error:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    CheckpointEngineRegistry.record_import_error("rlbridge_verl.wire.checkpoint_engine", error)
