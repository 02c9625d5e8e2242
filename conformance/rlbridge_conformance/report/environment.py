"""What a result was measured on: the machine, the versions, and the variables that change what these do."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rlbridge.importing import distribution_version
from rlbridge_conformance.report.redact import redact, redact_text

DISTRIBUTIONS = ("rlbridge", "ray", "torch", "nixl", "transformers", "vllm", "sglang", "verl", "openrlhf")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
VARIABLE_PREFIXES = ("GLOO_", "NCCL_", "NIXL_", "RAY_", "RLBRIDGE_", "UCX_")

_NIXL_WHEELS = ("nixl-cu12", "nixl-cu13", "nixl")
_INFINIBAND = Path("/sys/class/infiniband")
_SECONDS = 30
# In a process of its own: once UCX is loaded, a later agent of the same process no longer logs the wire that it took.
_ASK_UCX = (
    "import ctypes, sys; ucp = ctypes.CDLL(sys.argv[1]);"
    "ucp.ucp_get_version_string.restype = ctypes.c_char_p; print(ucp.ucp_get_version_string().decode())"
)

Text = Annotated[str, AfterValidator(redact_text)]
Variables = Annotated[dict[str, str], AfterValidator(redact)]


class Environment(BaseModel):
    """The machine, the versions and the variables. Imports none of what it asks for, and holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: str = Field(description="When this was looked up, in UTC.")
    python: str = Field(description="Version of Python.")
    platform: Text = Field(description="Operating system and architecture.")
    kernel: str = Field(description="Release of the kernel.")
    cpus: int = Field(ge=1, description="CPU cores that the process may use.")
    memory: int = Field(ge=0, description="Physical memory in bytes.")
    versions: dict[str, str | None] = Field(description="Version of each distribution, and of UCX in NIXL's wheel.")
    driver: str | None = Field(description="Version of the NVIDIA driver.")
    gpus: list[Text] | None = Field(description="Name of each GPU.")
    rdma_devices: list[Text] = Field(description="RDMA devices that the kernel knows.")
    variables: Variables = Field(description="Environment variables that matter, redacted.")


def look() -> Environment:
    """The environment of this process."""
    driver, gpus = _nvidia()
    return Environment(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=f"{_operating_system()}, {platform.machine()}",
        kernel=platform.release(),
        cpus=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions={**{name: distribution_version(name) or None for name in DISTRIBUTIONS}, "ucx": _ucx_version()},
        driver=driver,
        gpus=gpus,
        rdma_devices=sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else [],
        variables=variables_that_matter(os.environ),
    )


def variables_that_matter(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of UCX, NIXL, NCCL, Gloo, Ray and rlbridge, and those that say how many cores and which GPUs; sorted."""
    return {name: environ[name] for name in sorted(environ) if name in VARIABLES or name.startswith(VARIABLE_PREFIXES)}


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _ucx_version() -> str | None:
    """The version of the UCX that NIXL's wheel brings; several if its wheels for CUDA 12 and 13 differ."""
    asked = map(_version_of, _bundled_ucx())
    return ", ".join(sorted({version.strip() for version in asked if version})) or None


@functools.cache
def _version_of(library: Path) -> str | None:
    return _output([sys.executable, "-c", _ASK_UCX, str(library)])


def _bundled_ucx() -> list[Path]:
    found = []
    for name in _NIXL_WHEELS:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [Path(str(file.locate())) for file in files if file.name.startswith("libucp")]
    return found


def _nvidia() -> tuple[str | None, list[str] | None]:
    """Driver and GPUs; nothing where there is no nvidia-smi, or it finds no driver."""
    listed = _output(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"])
    rows = [line.split(", ", 1) for line in (listed or "").splitlines() if ", " in line]
    return (rows[0][0].strip(), [row[1].strip() for row in rows]) if rows else (None, None)


def _output(command: list[str]) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout
