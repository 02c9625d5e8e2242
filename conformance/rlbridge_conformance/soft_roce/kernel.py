"""The distribution's kernel, unpacked in the user's cache, and the initramfs that loads its modules and finds its root."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import platformdirs

from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.soft_roce.tools import call

CACHE_VARIABLE = "RLBRIDGE_SOFT_ROCE_CACHE"

_SECONDS = 120.0
_KERNELS = ("linux-image-amd64", "linux-image-generic")
"""Packages that depend on the newest kernel: Debian's, Ubuntu's."""

_MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay"),  # the root
    *("crc32_generic", "rdma_rxe", "ib_uverbs", "rdma_ucm", "dummy"),  # crc32_generic: rxe asks for it by name
    *("veth", "tun", "sch_tbf", "sch_netem"),  # the suite's own links
)
_OPTIONAL = ("virtio_pci", "overlay", "crc32_generic", "dummy", "veth", "tun", "sch_tbf", "sch_netem")
"""Built into some kernels, or missed by no more than a check."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted.

    Attributes:
        version: As `uname -r` says it.
        image: The kernel.
        initramfs: Its first file system.
    """

    version: str
    image: Path
    initramfs: Path


def cache() -> Path:
    """Where kernels are kept: `RLBRIDGE_SOFT_ROCE_CACHE`, or `rlbridge/soft-roce` in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else platformdirs.user_cache_path("rlbridge") / "soft-roce"


def newest() -> str:
    """The package of the distribution's newest kernel, for example linux-image-6.1.0-57-amd64.

    Raises:
        SuiteError: apt knows none.
    """
    for name in _KERNELS:
        known = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True, timeout=_SECONDS)
        found = re.search(r"Depends: (linux-image-[0-9]\S+)", known.stdout)
        if found:
            return found[1]
    raise SuiteError(f"apt knows neither {' nor '.join(_KERNELS)}", todo="apt-get update; the harness is for Debian and Ubuntu")


def kernel() -> Kernel:
    """The newest kernel, out of the cache or downloaded into it.

    Raises:
        SuiteError: it cannot be had, or lacks rdma_rxe.
    """
    package = newest()
    place = cache() / package
    if not (place / "initramfs").is_file():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="making-") as made:
            _make(package, Path(made))
            if not place.exists():  # somebody else may have been faster
                Path(made).chmod(0o755)
                Path(made).rename(place)
                Path(made).mkdir()  # for the context to remove
    version = _version(place)
    return Kernel(version, place / f"boot/vmlinuz-{version}", place / "initramfs")


def _make(package: str, place: Path) -> None:
    """Download the package with what has the modules, and unpack it into an empty directory; make the initramfs there."""
    packages = [package]
    if package.endswith("-generic"):  # Ubuntu has modules in packages of their own
        version = package.removeprefix("linux-image-")
        packages += [f"linux-modules-{version}", f"linux-modules-extra-{version}"]
    with tempfile.TemporaryDirectory(dir=place) as downloads:
        call(["apt-get", "download", "-o", "APT::Sandbox::User=root", *packages], cwd=downloads)
        for file in Path(downloads).glob("*.deb"):
            call(["dpkg-deb", "-x", str(file), str(place)])
    version = _version(place)
    modules = place / "lib/modules"
    if not modules.is_dir() and (place / "usr/lib/modules").is_dir():
        modules.symlink_to(place / "usr/lib/modules")
    if not (modules / version / "modules.dep").is_file():
        call(["depmod", "-b", str(place), version])
    _initramfs(place, version)


def _version(place: Path) -> str:
    found = sorted(path.name.removeprefix("vmlinuz-") for path in (place / "boot").glob("vmlinuz-*"))
    if not found:
        raise SuiteError(f"there is no kernel in {place}", todo=f"remove {place}, and try again")
    return found[0]


def _initramfs(place: Path, version: str) -> None:
    """busybox, the modules with all that they stand on, in their order, and the script `initramfs.sh`."""
    with tempfile.TemporaryDirectory(dir=place) as made:
        root = Path(made)
        for name in ("bin", "modules", "proc", "sys", "dev", "lower", "layer", "root"):
            (root / name).mkdir()
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, root / "bin/busybox")
        order = []
        for file in _with_dependencies(place, version):
            name = file.name.partition(".ko")[0] + ".ko"
            (root / "modules" / name).write_bytes(_unpacked(file))
            order.append(name)
        (root / "modules/order").write_text("\n".join(order) + "\n")
        (root / "init").write_text((files(__package__) / "initramfs.sh").read_text())
        (root / "init").chmod(0o755)
        listed = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        command = ["cpio", "-o", "-H", "newc", "--quiet"]
        packed = subprocess.run(command, cwd=root, input=listed.encode(), capture_output=True, timeout=_SECONDS)
        if packed.returncode != 0:
            raise SuiteError(f"cpio failed: {packed.stderr.decode().strip()}")
    (place / "initramfs").write_bytes(packed.stdout)


def _with_dependencies(place: Path, version: str) -> list[Path]:
    """The files of all modules, each after those that it needs."""
    found: dict[Path, None] = {}
    for module in _MODULES:
        try:
            shown = call(["modprobe", "-d", str(place), "-S", version, "--show-depends", module])
        except SuiteError as error:
            if module in _OPTIONAL:
                continue
            raise SuiteError(
                f"the kernel {version} has no module {module}",
                todo="a kernel with CONFIG_RDMA_RXE is needed, as Debian's amd64 and Ubuntu's generic ones are",
            ) from error
        for line in shown.splitlines():
            if line.startswith("insmod "):
                found[Path(line.split()[1])] = None
    return list(found)


def _unpacked(file: Path) -> bytes:
    """A module's bytes: Debian 12 has them plain, Debian 13 packed with xz, Ubuntu with zstd."""
    if file.suffix == ".xz":
        return lzma.decompress(file.read_bytes())
    if file.suffix == ".zst":
        if shutil.which("zstd") is None:
            raise SuiteError(f"{file.name} is packed, and there is no zstd here", todo="apt-get install zstd")
        return subprocess.run(["zstd", "-dcq", str(file)], capture_output=True, check=True, timeout=_SECONDS).stdout
    return file.read_bytes()
