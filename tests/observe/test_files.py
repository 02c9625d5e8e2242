import json
from types import SimpleNamespace

import numpy as np
import pluggy
import pytest

from rlbridge import hookspecs
from rlbridge.observe.files import FileObserver
from rlbridge.rl.run import Run


def report(version: int) -> SimpleNamespace:
    known = {"evidence": [{"wire": "cma"}], "ports": {"generator[0].rank[0]": {"received": 10}}}
    return SimpleNamespace(version=version, seconds=0.5, bytes=10, wire="cma", **known, verified=True, phases={"wire": 0.25})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def start(tmp_path):
    def started(resumed_step: int = 0):
        manager = pluggy.PluginManager("rlbridge")
        manager.add_hookspecs(hookspecs)
        manager.register(FileObserver())
        manager.check_pending()
        run = Run("grpo", tmp_path, None, steps=4, resumed_step=resumed_step)
        manager.hook.rlbridge_run_started(run=run)
        return run, manager.hook

    return started


def make_steps(run, hook, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        hook.rlbridge_step_finished(run=run, metrics={"loss": loss, "step": step})
        hook.rlbridge_weights_committed(run=run, report=report(step))
        hook.rlbridge_evaluated(run=run, step=step, reward=loss)


def test_every_event_is_in_its_file_at_once(tmp_path, start):
    run, hook = start()
    make_steps(run, hook, 1, 1, loss=0.5)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert lines(tmp_path / "syncs.jsonl") == [vars(report(1))]
    assert lines(tmp_path / "evaluations.jsonl") == [{"step": 1, "reward": 0.5}]


def test_what_json_cannot_hold_is_null(tmp_path, start):
    run, hook = start()
    metrics = {"step": np.int64(1), "a": float("nan"), "b": np.float32("inf"), "c": np.float64("nan"), "d": np.float32(0.5)}
    hook.rlbridge_step_finished(run=run, metrics=metrics)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5}]


@pytest.mark.parametrize("torn", ['{"step": 1, "lo', '{"step": 1, "loss": 9}'])
def test_a_resumed_run_drops_what_it_will_make_again_and_a_torn_line(tmp_path, start, torn):
    make_steps(*start(), 1, 4, loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run, hook = start(resumed_step=2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    make_steps(run, hook, 3, 4, loss=0.25)
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [0.5, 0.5, 0.25, 0.25]
    assert [line["reward"] for line in lines(tmp_path / "evaluations.jsonl")] == [0.5, 0.5, 0.25, 0.25]
    assert [line["version"] for line in lines(tmp_path / "syncs.jsonl")] == [1, 2, 3, 4]


def test_a_run_resumed_before_its_first_line_starts_the_files(tmp_path, start):
    make_steps(*start(resumed_step=3), 4, 4, loss=0.5)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [4]


def test_the_summary_is_written_whole_and_leaves_nothing_beside(tmp_path, start):
    run, hook = start()
    for syncs in (1, 2):
        hook.rlbridge_run_finished(run=run, result={"syncs": syncs, "worst": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"syncs": 2, "worst": None}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
