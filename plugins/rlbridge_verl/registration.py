"""What verl loads in each of its processes, through the entry-point group `verl.plugins`.

verl hides what is raised here. So nothing is done that could fail for want of anything but verl itself: the checkpoint engine
checks and imports what it needs when it is made.
"""

from __future__ import annotations

from rlbridge_verl import cpu_platform

cpu_platform.register()

from rlbridge_verl.wire import checkpoint_engine  # noqa: E402, F401  (it registers itself)
