from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import pytest

from rlbridge.errors import DeadlineError, DigestError, DirtyError, RlbridgeError, SyncError
from rlbridge.roles.batch import Completion, Sampling
from rlbridge.roles.generator import PauseMode
from rlbridge.sync.messages import Installed, Nothing, State, Update
from rlbridge_conformance.toy import ToyEngine, ToyGenerator
from tests.sync.stage import Stage, ask, eventually

Make = Callable[..., Stage]


def test_an_install_that_stops_half_way_leaves_an_engine_that_refuses_to_serve(make_stage: Make) -> None:
    stage = make_stage(2, (1, 2))
    whole, torn = stage.engines
    stage.sync(1)
    torn.do("break_install", True)
    with pytest.raises(RlbridgeError, match="stopped half-way") as caught:
        stage.sync(2)
    assert caught.value.where["phase"] == "install"
    assert caught.value.where["rank"].startswith("generator[1]")
    assert not torn.do("matches", 1)
    assert not torn.do("matches", 2)
    for call in ("served", "scored"):
        with pytest.raises(DirtyError, match="holds no whole version") as refusal:
            torn.do(call)
        assert refusal.value.where["rank"] == "generator[1]"
    assert ask(torn, "state", Nothing(), State) == State("dirty", 1)
    assert whole.do("served") == 2  # it was not left half-way because the other one failed
    assert whole.do("matches", 2)

    with pytest.raises(RlbridgeError, match="stopped half-way"):
        stage.sync(3)
    with pytest.raises(DirtyError):
        torn.do("served")

    torn.do("break_install", False)
    stage.sync(4)
    assert stage.serve(4)
    assert stage.session.epoch == 3


def test_a_tensor_that_the_install_leaves_out_is_found_in_the_live_parameters(make_stage: Make) -> None:
    stage = make_stage(2, (2,))
    stage.sync(1)
    stage.engines[0].do("skip_install", True)
    with pytest.raises(DigestError, match="in the live parameters") as caught:
        stage.sync(2)
    where = caught.value.where
    assert where["phase"] == "install"
    assert where["version"] == "2"
    assert where["rank"] == "generator[0].rank[0]"
    assert where["peer"].startswith("trainer[")
    assert where["tensor"]
    with pytest.raises(DirtyError):
        stage.engines[0].do("served")
    stage.engines[0].do("skip_install", False)
    stage.sync(3)
    assert stage.serve(3)


def test_scrambled_parameters_are_not_served_and_a_sync_writes_all_of_them(make_stage: Make) -> None:
    stage = make_stage(1, (2,))
    stage.sync(1)
    ask(stage.engines[0], "scramble", Nothing(), Nothing)
    with pytest.raises(DirtyError):
        stage.engines[0].do("served")
    stage.sync(2)
    assert stage.serve(2)


def test_an_install_drops_the_caches_and_refreshes_what_is_derived_and_tied(make_stage: Make) -> None:
    stage = make_stage(1, (2,))
    engine = stage.engines[0]
    for version in (1, 2):
        stage.sync(version)
        assert engine.do("refreshed")
        assert engine.do("apply", invalidated) == version
    engine.do("break_install", True)
    with pytest.raises(RlbridgeError):
        stage.sync(3)
    assert engine.do("apply", invalidated) == 2


def test_an_engine_that_is_busy_for_too_long_keeps_its_version(make_stage: Make) -> None:
    stage = make_stage()
    engine = stage.engines[0]
    stage.sync(1)
    pulled(stage, 2)
    generating = engine.begin("apply", busy_for, 3.0)
    assert eventually(lambda: engine.do("apply", is_busy))
    with (
        stage.with_options(deadline_seconds=0.5),
        pytest.raises(DeadlineError, match=r"was busy for 0\.5 s: nothing was installed") as caught,
    ):
        stage.session.install(2)
    assert caught.value.where["phase"] == "install"
    generating.result(10)
    assert stage.serve(1)
    stage.sync(3)
    assert stage.serve(3)


def test_an_update_waits_for_what_is_being_generated(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(1)
    generating = stage.engines[0].begin("apply", busy_for, 3.0)
    report = stage.sync(2)
    generating.result(10)
    assert stage.serve(2)
    assert report.phases["pause"] < 2.5  # the wait is no pause: the engine generates meanwhile


def test_an_update_that_holds_requests_does_not_wait_for_their_end(make_stage: Make) -> None:
    stage = make_stage(pause="keep")
    stage.sync(1)
    stage.engines[0].do("apply", speak_slowly)
    generating = stage.engines[0].begin("apply", spoken_versions)
    assert eventually(lambda: stage.engines[0].do("apply", has_spoken))
    stage.sync(2)
    assert sorted(set(generating.result(10))) == [1, 2]


def test_an_update_that_aborts_requests_leaves_them_their_tokens(make_stage: Make) -> None:
    stage = make_stage(pause="abort")
    stage.sync(1)
    stage.engines[0].do("apply", speak_slowly)
    generating = stage.engines[0].begin("apply", spoken_versions)
    assert eventually(lambda: stage.engines[0].do("apply", has_spoken))
    stage.sync(2)
    versions = generating.result(10)
    assert set(versions) == {1}
    assert len(versions) < ENDLESS
    assert stage.serve(2)


def test_requests_that_an_update_held_end_when_it_fails(make_stage: Make) -> None:
    stage = make_stage(pause="keep")
    stage.sync(1)
    engine = stage.engines[0]
    engine.do("apply", speak_slowly)
    generating = engine.begin("apply", spoken_versions)
    assert eventually(lambda: engine.do("apply", has_spoken))
    engine.do("break_install", True)
    with pytest.raises(RlbridgeError, match="stopped half-way"):
        stage.sync(2)
    with pytest.raises(DirtyError):
        generating.result(10)
    engine.do("break_install", False)
    stage.sync(3)
    assert set(engine.do("apply", spoken_versions)) == {3}


@pytest.mark.parametrize("pause", ["wait", "keep", "abort"])
def test_no_update_comes_into_a_score(make_stage: Make, pause: str) -> None:
    stage = make_stage(pause=pause)
    stage.sync(1)
    pulled(stage, 2)
    scoring = stage.engines[0].begin("apply", busy_for, 3.0, "score")
    assert eventually(lambda: stage.engines[0].do("apply", is_busy))
    with stage.with_options(deadline_seconds=0.5), pytest.raises(DeadlineError, match="was busy"):
        stage.session.install(2)
    scoring.result(10)
    assert stage.serve(1)


def test_a_stale_update_touches_nothing(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(3)
    engine = stage.engines[0]
    for version in (2, 3):
        with pytest.raises(SyncError, match="not newer"):
            ask(engine, "update", Update(version, 5.0), Installed)
    assert stage.serve(3)


def invalidated(engine: ToyEngine) -> int:
    return engine.generator.invalidated


def busy_for(engine: ToyEngine, seconds: float, call: Literal["generate", "score"] = "generate") -> None:
    """Generate, or score, for so long."""
    with engine.engine._called(call):
        time.sleep(seconds)


WORDS = 50
ENDLESS = 4000


class SlowGenerator(ToyGenerator):
    """One that says a word every 5 ms, `WORDS` of them after it has been paused, and can be paused in every way."""

    paused = ""
    met = spoken = False

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        versions: list[int] = []
        left = WORDS
        while left and len(versions) < ENDLESS and self.paused != "abort":
            time.sleep(0.005)
            if not self.paused:
                versions.append(self.version)
                self.spoken = True
                left -= self.met
        return [Completion([7] * len(versions), [0.0] * len(versions), versions, "length")]

    def pause(self, mode: PauseMode = "wait") -> None:
        self.paused, self.met = mode, True
        time.sleep(0.02)

    def resume(self) -> None:
        self.paused = ""


def speak_slowly(engine: ToyEngine) -> None:
    engine.generator.__class__ = SlowGenerator


def has_spoken(engine: ToyEngine) -> bool:
    return engine.generator.spoken  # type: ignore[attr-defined]


def is_busy(engine: ToyEngine) -> bool:
    return engine.engine._call is not None


def pulled(stage: Stage, version: int) -> None:
    """Bring a version as far as to the engines' arenas."""
    stage.load(version)
    stage.session.publish(version)
    stage.session.pull(version)


def spoken_versions(engine: ToyEngine) -> list[int]:
    return engine.engine.generate([[1]], Sampling(max_tokens=ENDLESS))[0].versions
