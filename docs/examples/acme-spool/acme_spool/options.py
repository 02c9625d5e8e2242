"""What `spool` can be told in the config."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import Field

from rlbridge.roles.transport import TransportOptions


class SpoolOptions(TransportOptions):
    """The transport section of the config when `transport.backend` is spool."""

    directory: Path = Field(Path(tempfile.gettempdir()), description="A directory that trainers and generators both see.")
