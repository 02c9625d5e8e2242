"""`transport.backend: auto` takes the first that works, and says why not the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlbridge.config import RunConfig, load_config
from rlbridge.errors import TransportError
from rlbridge.plugins import Registry, registry
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.rl.transports import choose_transport


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"path": "m"}, "data": {"path": "p.jsonl"}}))
    return load_config(file, overrides)


def test_a_transport_that_is_named_is_taken_without_a_word(tmp_path: Path) -> None:
    told: list[str] = []
    assert choose_transport(config(tmp_path, "transport.backend=object_store"), "cpu", told.append).backend == "object_store"
    assert told == []


def test_a_transport_that_cannot_work_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="cuda_ipc needs a GPU"):
        choose_transport(
            config(tmp_path, "transport.backend=rdt", "transport.tensor_transport=cuda_ipc"), "cpu", lambda line: None
        )


def test_auto_goes_down_the_list_and_gives_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = Registry.missing

    def without_nixl(self: Registry, role: str, name: str) -> str | None:
        return "no module named 'nixl'" if name == "nixl" else really(self, role, name)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "missing", without_nixl)
    rdt = registry().load("transport", "rdt")
    monkeypatch.setattr(
        rdt, "unavailable", classmethod(lambda cls, options, device: "no NIXL" if options.tensor_transport == "nixl" else None)
    )
    told: list[str] = []
    chosen = choose_transport(config(tmp_path, "transport.backend=auto"), "cpu", told.append)
    assert chosen.model_dump() == {"backend": "rdt", "tensor_transport": "gloo", "require": "any"}
    assert told == [
        "transport auto: not nixl: no module named 'nixl'",
        "transport auto: not rdt tensor_transport=nixl: no NIXL",
        "transport auto: rdt tensor_transport=gloo, the first that works here",
    ]


@pytest.mark.skipif(has_rdma_device(), reason="this machine has an RDMA device")
def test_auto_keeps_to_what_is_required(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(TransportError, match="no transport works here"):
        choose_transport(config(tmp_path, "transport.backend=auto", "transport.require=rdma"), "cpu", told.append)
    assert len(told) == 4
    assert all("RDMA" in line for line in told)
