"""The machine and the versions that a report names."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlbridge_conformance.report import environment, look
from rlbridge_conformance.report.redact import MARK


def test_environment_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '570.1, NVIDIA H100 80GB HBM3\\n570.1, NVIDIA H100 80GB HBM3\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(environment, "_bundled_ucx", list)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    monkeypatch.setenv("OTHER", "1")
    found = look()
    assert found.python == sys.version.split()[0]
    assert found.cpus >= 1
    assert found.memory > 2**28
    assert found.versions["rlbridge"] == importlib.metadata.version("rlbridge")
    assert set(found.versions) == {*environment.DISTRIBUTIONS, "ucx"}
    assert (found.driver, found.gpus) == ("570.1", ["NVIDIA H100 80GB HBM3"] * 2)
    assert found.rdma_devices == ["bin", "mlx5_0", "mlx5_1"]
    assert found.variables["NCCL_DEBUG"] == "INFO"
    assert found.variables["RAY_AUTH_TOKEN"] == MARK
    assert "OTHER" not in found.variables


def test_version_of_ucx_is_that_of_the_wheel_of_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nixl")
    bundled = environment._bundled_ucx()
    monkeypatch.setattr(environment, "_bundled_ucx", lambda: bundled[:1])
    assert re.fullmatch(r"\d+\.\d+\.\d+", look().versions["ucx"] or "")


def test_machine_without_gpus_rdma_and_nixl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path / "none")
    monkeypatch.setattr(environment, "_NIXL_WHEELS", ("no-such-distribution",))
    found = look()
    assert (found.driver, found.gpus, found.rdma_devices, found.versions["ucx"]) == (None, None, [], None)


def test_looking_at_the_environment_imports_no_framework() -> None:
    code = (
        "import sys; from rlbridge_conformance.report import look; look();"
        "print([name for name in ('ray', 'torch', 'nixl', 'transformers', 'pytest') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
