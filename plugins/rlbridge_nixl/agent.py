"""A thin face over a NIXL agent: its environment, its memory, and what its UCX backend says of itself."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbridge.errors import TransportError
from rlbridge.rdma.ucx import quiet_ucx

if TYPE_CHECKING:
    import torch

_TLS = {"shm": "cma,tcp,self", "tcp": "tcp,self", "rdma": "rc,ud,dc,self"}

_CUDA_TLS = {"shm": "cuda_ipc,cuda_copy,gdr_copy", "tcp": "cuda_copy,gdr_copy", "rdma": "cuda_copy,gdr_copy"}
"""What UCX needs besides to know memory of GPUs, and to stage it."""

_PROGRESS_MICROSECONDS = 5000
"""How long an agent's progress thread sleeps at most. Events wake it; this is for what has none."""

_making = threading.Lock()
"""Held while an agent is made: two at once would each take the other's variables for those that were there before."""

_OURS = "/proc/self/fd/"
"""How the name of our own report begins. A process that was started while an agent was being made may have inherited one."""

_logs: dict[int, str] = {}  # by process, since a fork inherits this dict: where UCX writes its report


def make_agent(name: str, wire: str, net_devices: str, device: str) -> tuple[Any, str]:
    """A NIXL agent with UCX for memory of `device`, and its unique name.

    Raises:
        TransportError: NIXL has no UCX backend here that can use the wire.
    """
    quiet_ucx()
    import nixl._api as nixl

    logging.getLogger("nixl").setLevel(logging.WARNING)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    # A pull has a thread of its own, and is asked about from others.
    config = nixl.nixl_agent_config(
        backends=["UCX"], capture_telemetry=True, sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    )
    try:
        with _making, _environment(_ucx_variables(wire, net_devices, device)), _patient_progress(nixl.nixlBind):
            return nixl.nixl_agent(unique, config), unique
    except Exception as error:
        raise TransportError(
            f"NIXL cannot start its UCX backend: {type(error).__name__}: {error}",
            wire=wire,
            net_devices=net_devices or None,
            todo="is the interface of transport.net_devices there, and up? transport.wire=any lets UCX pick;"
            " transport.backend=object_store needs no NIXL",
        ) from error


def _ucx_variables(wire: str, net_devices: str, device: str) -> dict[str, str]:
    """What UCX reads when it is loaded, by the process's first agent (the log), and when an agent is made (the rest)."""
    made = {"UCX_LOG_FILE": _log(), "UCX_PROTO_INFO": "y"}
    if wire in _TLS:
        made["UCX_TLS"] = _TLS[wire] if device == "cpu" else f"{_TLS[wire]},{_CUDA_TLS[wire]}"
    if net_devices:
        made["UCX_NET_DEVICES"] = net_devices
    elif wire == "shm":  # one host by definition; UCX listens on every interface that it may use
        made["UCX_NET_DEVICES"] = "lo"
    return made


@contextlib.contextmanager
def _patient_progress(bindings: Any) -> Iterator[None]:
    """Let an agent's progress thread sleep until UCX has an event.

    NIXL's Python face (1.5.1) sets the thread's delay to 0, and it then spins: every trainer and engine rank uses up a core for
    as long as it has an agent, and on two cores transfers took two to four times as long as with a delay.
    """
    theirs: Any = bindings.nixlAgentConfig

    class PatientConfig(theirs):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _PROGRESS_MICROSECONDS if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = PatientConfig
    try:
        yield
    finally:
        bindings.nixlAgentConfig = theirs


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for as long as an agent is being made: neither another agent nor a child process is to inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def descriptors(agent: Any, spans: Sequence[tuple[int, int, int]], kind: str) -> Any:
    """NIXL's list for (address, bytes, device id) spans; `kind` is "DRAM" or "VRAM"."""
    return agent.get_xfer_descs(list(spans), kind)


def memory_kind(block: torch.Tensor) -> str:
    """NIXL's word for where a block lies."""
    return "VRAM" if block.is_cuda else "DRAM"


def device_id(block: torch.Tensor) -> int:
    """NIXL's device number of a block."""
    return block.device.index or 0 if block.is_cuda else 0


def wires_used(agent_name: str, operation: str) -> list[str]:
    """The UCX wires of this agent's large transfers, out of UCX's own protocol report: ["cma"], ["tcp/lo"] ...

    Empty where UCX has reported nothing: it was loaded before our first agent, or nothing was transferred.
    """
    ctypes.CDLL(None).fflush(None)  # UCX buffers its log file
    path = Path(_log().replace("%p", str(os.getpid())))
    return parse_report(path.read_text(errors="replace"), agent_name, operation) if path.is_file() else []


def parse_report(text: str, agent_name: str, operation: str) -> list[str]:
    """What `wires_used` reads: of each table titled with the agent and the operation, the row that reaches to infinity."""
    verb = {"read": "remote memory read by ucp_get", "write": "remote memory write by ucp_put"}[operation]
    found: dict[str, None] = {}
    owner, titled = "", False
    for line in text.splitlines():
        cell = line.partition("|")[2].strip()
        if "cfg#" in cell:
            owner, titled = cell, False
        elif cell.startswith(("remote memory", "active message", "tagged message", "atomic")):
            titled = cell.startswith(verb) and owner.startswith(f"{agent_name} ") and f"{agent_name} self " not in owner
        elif titled and "..inf" in cell:
            for wire in re.findall(r"([a-z_0-9]+)/([A-Za-z_0-9:.-]+)", cell.rpartition("|")[0].rpartition("|")[2]):
                found[wire[0] if wire[1] == "memory" else "/".join(wire)] = None
    return list(found)


def _log() -> str:
    """The file of UCX's report: the user's, or one in memory, which no other user can touch and which ends with the process."""
    theirs = os.environ.get("UCX_LOG_FILE", "")
    pid = os.getpid()
    if pid not in _logs:
        _logs.clear()
        own = not theirs or theirs.startswith(_OURS)
        _logs[pid] = f"{_OURS}{os.memfd_create('rlbridge-ucx')}" if own else theirs
    return _logs[pid]
