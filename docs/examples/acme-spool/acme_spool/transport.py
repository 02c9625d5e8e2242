"""Weights as files: a source writes one for each sink and version, and the rename that completes a file is the signal."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from acme_spool.options import SpoolOptions
from rlbridge.errors import DeadlineError, TransportError
from rlbridge.roles.transport import Copy, Transport, TransportContext, WireEvidence

_POLL_SECONDS = 0.001


class SpoolTransport(Transport[SpoolOptions]):
    """One end: a source that writes files, or a sink that reads them."""

    @classmethod
    def unavailable(cls, options: SpoolOptions, device: str) -> str | None:
        """The directory has to exist here and be writable."""
        usable = options.directory.is_dir() and os.access(options.directory, os.W_OK)
        return None if usable else f"transport.directory={options.directory} is no directory that can be written to"

    def __init__(self, context: TransportContext, options: SpoolOptions) -> None:
        self._context = context
        self._options = options
        self._blocks: list[torch.Tensor] = []
        self._copies: dict[tuple[int, str], list[Copy]] = {}  # by slot and peer
        self._directory: Path | None = None
        self._peers: dict[str, Path] = {}
        self._moved = 0

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        """A directory of this epoch's own, so that no file of an earlier epoch is ever read."""
        self._blocks = list(blocks)
        if self._context.side == "source":
            self._directory = Path(tempfile.mkdtemp(prefix="acme-spool-", dir=self._options.directory))
        return str(self._directory or "").encode()

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        """Both ends see the copies between them in the same order, so a file needs no table of contents."""
        self._peers = {name: Path(address.decode()) for name, address in peers.items()}
        for copy in copies:
            peer = copy.sink if self._context.side == "source" else copy.source
            self._copies.setdefault((copy.slot, peer), []).append(copy)

    def send(self, version: int, slot: int, deadline: float) -> None:
        """One file for each sink, under another name until it is whole."""
        assert self._directory is not None
        for (its_slot, sink), copies in self._copies.items():
            if its_slot != slot:
                continue
            path = self._directory / f"{sink}.{version}"
            part = path.with_name(f"{path.name}.part")
            with part.open("wb") as file:
                for copy in copies:
                    if time.monotonic() > deadline:
                        raise DeadlineError("writing did not end in time", peer=sink, version=version, phase="wire")
                    block = self._blocks[copy.source_block][copy.source_offset : copy.source_offset + copy.nbytes]
                    file.write(block.cpu().numpy().data)
            part.rename(path)

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        """Wait for the file of every source, and read each once."""
        total = 0
        for source, directory in self._peers.items():
            path = directory / f"{self._context.name}.{version}"
            while not path.exists():
                if time.monotonic() > deadline:
                    raise DeadlineError(f"{source} wrote no {path.name}", peer=source, version=version, phase="wire")
                time.sleep(_POLL_SECONDS)
            total += self._read(path, self._copies[slot, source], source)
            path.unlink()
        self._moved += total
        return total

    def evidence(self) -> WireEvidence:
        """A source reports no wire: the sinks do."""
        wire = "file" if self._context.side == "sink" else ""
        return WireEvidence("spool", wire, "this transport opens the files itself", self._moved)

    def close(self) -> None:
        """Leave no file behind."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory, self._blocks, self._copies, self._peers = None, [], {}, {}

    def _read(self, path: Path, copies: Sequence[Copy], source: str) -> int:
        held = np.fromfile(path, dtype=np.uint8)
        due = sum(copy.nbytes for copy in copies)
        if held.nbytes != due:
            raise TransportError(f"{path} holds {held.nbytes} bytes, and {due} were due", peer=source, phase="wire")
        at = 0
        for copy in copies:
            block = self._blocks[copy.sink_block][copy.sink_offset : copy.sink_offset + copy.nbytes]
            block.copy_(torch.from_numpy(held[at : at + copy.nbytes]))
            at += copy.nbytes
        return due
