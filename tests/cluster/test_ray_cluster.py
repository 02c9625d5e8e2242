"""What is asked of a cluster is compared with what it has, and what Ray raises becomes our errors."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from rlbridge.cluster import ray_cluster
from rlbridge.cluster.party import translate
from rlbridge.cluster.ray_cluster import Ask, check_room
from rlbridge.errors import PeerLostError, ResourceError, SyncError
from rlbridge.roles.options import Resources

ASKS = [Ask("trainer", 4, Resources(cpus=1, gpus=1, accelerator="H100")), Ask("generator", 2, Resources(cpus=2))]


def pretend(monkeypatch: pytest.MonkeyPatch, there: dict[str, float], free: dict[str, float]) -> None:
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(ray_cluster.ray, "available_resources", lambda: free)


def test_a_cluster_with_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}
    pretend(monkeypatch, there, there)
    check_room(ASKS)


@pytest.mark.parametrize(
    ("there", "free", "expected"),
    [
        ({"CPU": 7.0, "GPU": 4.0, "accelerator_type:H100": 1.0}, None, "asks for 8 CPU .* the cluster has 7 CPU$"),
        ({"CPU": 8.0, "GPU": 4.0}, None, "0 accelerator_type:H100"),
        (
            {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0},
            {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0},
            "asks for 4 GPU .* the cluster has 1 GPU free",
        ),
    ],
    ids=["too few cores", "another accelerator", "taken by others"],
)
def test_what_is_asked_and_what_there_is_are_both_said(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, float], free: dict[str, float] | None, expected: str
) -> None:
    pretend(monkeypatch, there, free or there)
    with pytest.raises(ResourceError, match=expected.replace("$", r"(\s|$)")) as caught:
        check_room(ASKS)
    assert "trainer 4 x" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ActorDiedError(), PeerLostError), (OutOfMemoryError("no memory"), SyncError), (PeerLostError("gone"), PeerLostError)],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
def test_what_ray_raises_is_ours_and_names_the_process(error: Any, kind: type[Exception]) -> None:
    ours = translate(error, "generator[1]")
    assert type(ours) is kind
    if not isinstance(error, PeerLostError):
        assert "generator[1]" in str(ours)


def test_an_error_that_is_not_rays_stays_what_it_is() -> None:
    error = ZeroDivisionError()
    assert translate(error, "trainer[0]") is error
