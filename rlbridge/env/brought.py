"""The distributions that an environment gets from the driver's own: rlbridge, and the plugins.

They are copied, as their RECORD lists them, and never fetched: an index may have another project of the same name, and the
driver's may be no released version. An editable install is a finder and metadata, so its copy follows the driver's source too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath
from pathlib import Path

from rlbridge.env.driver import normalised
from rlbridge.errors import BuildError

_GROUP = "rlbridge"
# Say how a distribution was installed, not what it is.
_OF_THE_INSTALLER = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_cache.json"}


def wanted(distribution: str) -> dict[str, str]:
    """What has to be brought into an environment that `distribution` declares, and the fingerprint of each: rlbridge, that
    distribution, and every other with plugins, since a run may load any of them there.

    Raises:
        BuildError: the installer of rlbridge, or of the distribution, left no list of its files.
    """
    plugins = {entry.dist.name for entry in importlib.metadata.entry_points(group=_GROUP) if entry.dist}
    fingerprints = {}
    for name in sorted({"rlbridge", distribution, *plugins}):
        if list(_files(_distribution(name))):
            fingerprints[name] = fingerprint(name)
        elif name in ("rlbridge", distribution):
            raise BuildError(
                f"{name} cannot be copied into an environment: its installer left no list of its files",
                todo=f"install {name} with pip or uv",
            )
    return fingerprints


def fingerprint(name: str) -> str:
    """Differs where the driver's distribution of that name is another: another version, build or source."""
    found = _distribution(name)
    listed = sorted((str(f), f.hash.value if f.hash else "") for f in _files(found) if f.name not in _OF_THE_INSTALLER)
    return hashlib.sha256(json.dumps([found.version, source(name), listed]).encode()).hexdigest()[:16]


def source(name: str) -> str:
    """Where an editable install has its source; empty for any other."""
    origin = json.loads(_distribution(name).read_text("direct_url.json") or "{}")
    return str(origin["url"]) if origin.get("dir_info", {}).get("editable") else ""


def place_of(name: str) -> Path:
    """The folder of packages that the driver has the distribution in."""
    return Path(str(_distribution(name).locate_file("")))


def bring(name: str, site: Path) -> list[Path]:
    """Copy a distribution of the driver's environment into `site`, in place of the one that is there. Returns the copies.

    Raises:
        OSError: it cannot be written.
    """
    _take_away(name, site)
    found = _distribution(name)
    copies = []
    for file in _files(found):
        copy = site / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(found.locate_file(file)), copy)
        copies.append(copy)
        if copy.name == "RECORD" and copy.parent.suffix == ".dist-info":
            _narrow(copy)
    return copies


def _distribution(name: str) -> Distribution:
    found = list(importlib.metadata.distributions(name=name))
    if not found:
        raise BuildError(f"{name} is not installed here, so it cannot be copied into an environment")
    # A source tree on the path has metadata of its own, which says nothing of what is installed.
    return next((each for each in found if each.read_text("RECORD")), found[0])


def _files(distribution: Distribution) -> Iterator[PackagePath]:
    """What lies within site-packages: scripts name the driver's interpreter, and bytecode is made anew."""
    listed = distribution.files if distribution.read_text("RECORD") else None
    for file in listed or ():
        if ".." not in file.parts and not file.is_absolute() and file.suffix != ".pyc":
            yield file


def _take_away(name: str, site: Path) -> None:
    for old in importlib.metadata.distributions(path=[str(site)]):
        if old.name and normalised(old.name) == normalised(name):
            for file in _files(old):
                (site / file).unlink(missing_ok=True)


def _narrow(record: Path) -> None:
    """Leave only what was copied in a RECORD, so that an uninstaller finds what it looks for."""
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not line.startswith(("..", "/")) and ".pyc," not in line))
