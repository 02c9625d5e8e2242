"""The user-space half of rdma_rxe for the libibverbs that a NIXL wheel brings.

The wheel's library has a name of its own, and does not find the distribution's providers; and the distribution's provider
would bring a second libibverbs into the process and make itself known to that one. A copy of the provider that asks for the
wheel's library by its name works; `RDMAV_DRIVERS` tells the library of it.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.soft_roce.tools import call

_LIBRARIES = "libibverbs"


def make(directory: Path) -> dict[str, str]:
    """A provider in `directory` for the NIXL of this environment; the variables that make it known.

    Raises:
        SuiteError: the distribution's provider is missing.
    """
    bundled = _bundled()
    if bundled is None:
        return {}  # a NIXL that uses the distribution's own library finds the provider by itself
    found = sorted(Path("/usr/lib").glob("*/libibverbs/librxe-rdmav*.so"))
    if not found:
        raise SuiteError("there is no librxe-rdmav*.so below /usr/lib", todo="apt-get install ibverbs-providers")
    copy = Path(shutil.copy(found[-1], directory))
    call(["patchelf", "--set-rpath", str(bundled.parent), str(copy)])  # not both at once: patchelf 0.14 mixes them up
    call(["patchelf", "--replace-needed", "libibverbs.so.1", bundled.name, str(copy)])
    # libibverbs appends "-rdmav34.so" to the name that it is given.
    return {"RDMAV_DRIVERS": str(copy).rpartition("-rdmav")[0]}


def _bundled() -> Path | None:
    """The libibverbs inside the wheel that `import nixl` would load here; None: it has none."""
    spec = importlib.util.find_spec("nixl")
    if spec is None or spec.origin is None:
        raise SuiteError("nixl is not installed", todo="pip install 'rlbridge[nixl]'")
    site = Path(spec.origin).parent.parent
    found = sorted(site.glob(f"nixl_cu1*.libs/{_LIBRARIES}-*.so.*"))
    return found[-1] if found else None
