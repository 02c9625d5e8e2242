"""A one-sided READ between processes of one host: the kernel copies from the source's memory (process_vm_readv, "CMA").

The source registers nothing and runs nothing; it is read even while it is stopped. A read is over when the call returns, so a
transfer that was given up writes nothing any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from rlbridge.errors import DeadlineError, PeerLostError, TransportError
from rlbridge.roles.transport import Copy, Transport, TransportContext, WireEvidence
from rlbridge_conformance.reference.options import ReferenceTransportOptions

_PR_SET_PTRACER = 0x59616D61  # prctl(2): with Yama, who may read this process's memory besides its ancestors
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_ALLOW = "both ends need one user and one pid namespace, kernel.yama.ptrace_scope below 2 and, in a container, SYS_PTRACE"


class Block(msgspec.Struct, frozen=True):
    """Where a registered block lies in its process."""

    address: int
    nbytes: int


class Address(msgspec.Struct, frozen=True):
    """A process and its blocks. `started` tells it from a later one of the same pid, `where` from one elsewhere."""

    where: str
    pid: int
    started: int
    blocks: list[Block]


class ReferenceTransport(Transport[ReferenceTransportOptions]):
    """One end. The sink reads; the source only gives out where its memory lies."""

    @classmethod
    def unavailable(cls, options: ReferenceTransportOptions, device: str) -> str | None:
        """The call may be missing, or forbidden."""
        if device != "cpu":
            return f"it reads the memory of the host, and the weights are on {device}"
        if _process_vm_readv is None:
            return "this system has no process_vm_readv: it is a call of Linux"
        if _yama_scope() >= 2 and os.geteuid() != 0:
            return f"kernel.yama.ptrace_scope is {_yama_scope()}: processes may not read each other's memory"
        probe = ctypes.c_char()
        if _readv(os.getpid(), ctypes.addressof(probe), ctypes.addressof(probe), 1) != 1:
            return f"process_vm_readv is forbidden here ({os.strerror(ctypes.get_errno())}): by a container's seccomp profile?"
        return None

    def __init__(self, context: TransportContext, options: ReferenceTransportOptions) -> None:
        self.context, self.options = context, options
        self.blocks: list[torch.Tensor] = []
        self.peers: dict[str, Address] = {}
        self.copies: list[Copy] = []
        self.moved = 0

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        """Let the peers in, and say where the blocks lie."""
        self.blocks = list(blocks)
        self.allow_readers()
        described = [Block(block.data_ptr(), block.numel()) for block in self.blocks]
        return msgspec.msgpack.encode(Address(_here(), os.getpid(), _started(os.getpid()) or 0, described))

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        """The sink learns whom to read, and checks that it may, and that every copy stays within the blocks."""
        if self.context.side == "source":
            return
        self.peers = {name: msgspec.msgpack.decode(raw, type=Address) for name, raw in peers.items()}
        for name in self.peers:
            self.check_peer(name)
        for copy in copies:
            self.check_bounds(copy)
        self.copies = list(copies)

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        """Read every copy of the slot, one after the other."""
        wanted = self.copies_of(slot)
        for index, copy in enumerate(wanted):
            try:
                self.read_copy(copy, deadline)
            except DeadlineError as error:
                missing = sorted({left.source for left in wanted[index:]})
                what = f"{error.what}; not read: {', '.join(missing)}"
                raise DeadlineError(what, peer=missing[0], version=version, phase="wire") from error
        return sum(copy.nbytes for copy in wanted)

    def evidence(self) -> WireEvidence:
        """The kernel's own count of bytes."""
        if self.context.side == "source":
            return WireEvidence("reference", "", "the other end reads")
        return WireEvidence("reference", "cma", "what process_vm_readv returned", self.moved)

    def close(self) -> None:
        """Forget the peers and the blocks."""
        self.blocks, self.peers, self.copies = [], {}, []

    def allow_readers(self) -> None:
        """Without the Yama module the call fails, and is not needed."""
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)

    def copies_of(self, slot: int) -> list[Copy]:
        """The copies that make up a version that lies in the sources' buffer `slot`."""
        return [copy for copy in self.copies if copy.slot == slot]

    def check_peer(self, name: str) -> None:
        """Refuse a peer that is not the process that gave out its address.

        Raises:
            PeerLostError: the process is gone, whether or not another has its pid.
            TransportError: it is where this process cannot reach.
        """
        peer = self.peers[name]
        if peer.where != _here():
            raise TransportError(
                "the peer is on another host or in another pid namespace, where this process cannot read its memory",
                rank=self.context.name,
                peer=name,
                phase="connect",
                todo="use a transport that crosses hosts, for example nixl",
            )
        if _started(peer.pid) != peer.started:
            raise self.gone(name)

    def check_bounds(self, copy: Copy) -> None:
        """Refuse a copy that would leave a block of either end.

        Raises:
            TransportError: it does, or its source has given out no address.
        """
        if copy.source not in self.peers:
            raise TransportError("a copy is asked for from a peer without an address", rank=self.context.name, peer=copy.source)
        ends = (
            ("source", [block.nbytes for block in self.peers[copy.source].blocks], copy.source_block, copy.source_offset),
            ("sink", [block.numel() for block in self.blocks], copy.sink_block, copy.sink_offset),
        )
        for end, sizes, block, offset in ends:
            if not (0 <= block < len(sizes) and offset >= 0 and 0 <= copy.nbytes <= sizes[block] - offset):
                raise TransportError(
                    f"a copy of {copy.nbytes} bytes at {offset} of block {block} leaves the {end}'s blocks of {sizes} bytes",
                    rank=self.context.name,
                    peer=copy.source,
                    phase="connect",
                )

    def read_copy(self, copy: Copy, deadline: float) -> None:
        """Read one copy in buckets, the deadline being looked at before each.

        Raises:
            DeadlineError: it has passed.
            PeerLostError: the source is gone.
        """
        remote = self.peers[copy.source].blocks[copy.source_block].address + copy.source_offset
        local = self.blocks[copy.sink_block].data_ptr() + copy.sink_offset
        for done in range(0, copy.nbytes, self.options.bucket_bytes):
            self.wait_turn(deadline)
            self.check_peer(copy.source)
            self.read(copy.source, remote + done, local + done, min(self.options.bucket_bytes, copy.nbytes - done))

    def wait_turn(self, deadline: float) -> None:
        """Sleep as a slow wire would, but not past the deadline.

        Raises:
            DeadlineError: it has passed.
        """
        if self.options.delay_seconds:
            time.sleep(max(0.0, min(self.options.delay_seconds, deadline - time.monotonic())))
        if time.monotonic() >= deadline:
            raise DeadlineError("the deadline passed between two reads")

    def read(self, name: str, remote: int, local: int, nbytes: int) -> None:
        """Read `nbytes` at `remote` in the peer to `local`; a call that moves fewer is followed by another.

        Raises:
            PeerLostError: the peer is gone.
            TransportError: the kernel refuses.
        """
        while nbytes:
            moved = _readv(self.peers[name].pid, remote, local, nbytes)
            if moved <= 0:
                raise self.failed(name, ctypes.get_errno())
            self.moved += moved
            remote, local, nbytes = remote + moved, local + moved, nbytes - moved

    def failed(self, name: str, number: int) -> PeerLostError | TransportError:
        """The error of a read that failed with errno `number`."""
        if number == errno.ESRCH:
            return self.gone(name)
        todo = {
            errno.EPERM: _ALLOW,
            errno.EFAULT: "its memory is no longer there: has it ended its epoch? begin a new one",
        }.get(number, "")
        return TransportError(
            f"process_vm_readv failed: {os.strerror(number)}", rank=self.context.name, peer=name, phase="wire", todo=todo
        )

    def gone(self, name: str) -> PeerLostError:
        """The error of a peer whose process has ended."""
        return PeerLostError(f"the process of {name} (pid {self.peers[name].pid}) is gone", rank=self.context.name, peer=name)


class _Part(ctypes.Structure):
    """The iovec of readv(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


_process_vm_readv = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _process_vm_readv is not None:
    _process_vm_readv.restype = ctypes.c_ssize_t
    _parts = ctypes.POINTER(_Part)
    _process_vm_readv.argtypes = (ctypes.c_int, _parts, ctypes.c_ulong, _parts, ctypes.c_ulong, ctypes.c_ulong)


def _readv(pid: int, remote: int, local: int, nbytes: int) -> int:
    """The bytes moved; -1 after an error, which is in `ctypes.get_errno()`."""
    assert _process_vm_readv is not None
    return int(_process_vm_readv(pid, _Part(local, nbytes), 1, _Part(remote, nbytes), 1, 0))


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # after the name, which may hold anything, comes field 3


def _here() -> str:
    """The host since its last boot, and the pid namespace: a pid means nothing elsewhere."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + str(Path("/proc/self/ns/pid").readlink())


def _yama_scope() -> int:
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0
