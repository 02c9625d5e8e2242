"""What lies in `inside` needs OpenRLHF, and is run in its environment by `test_inside`."""

from __future__ import annotations

collect_ignore = ["inside"]
