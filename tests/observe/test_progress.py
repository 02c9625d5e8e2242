import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pluggy
from rich.console import Console

from rlbridge import hookspecs
from rlbridge.observe.progress import ProgressObserver, verdict
from rlbridge.rl.run import Run

RESULT = {
    "steps": 3,
    "reward": {"first": 0.25, "last": 0.75, "best": 0.875},
    "syncs": 4,
    "verified": True,
    "trainer": "native",
    "generator": "vllm",
    "transport": "nixl",
    "wire": "cma",
    "sync_seconds": {"p50": 0.0123, "p95": 0.02, "max": 0.03},
    "bytes_per_sync": 1_500_000,
    "wall_seconds": 9.04,
}


def shown(*, terminal: bool, steps: int = 3, resumed_step: int = 0, every_seconds: float = 0.0, result=RESULT) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, color_system=None)
    manager = pluggy.PluginManager("rlbridge")
    manager.add_hookspecs(hookspecs)
    manager.register(ProgressObserver(console, every_seconds))
    run = Run("[a]", Path("runs/[a]"), None, steps=steps, resumed_step=resumed_step)
    manager.hook.rlbridge_run_started(run=run)
    manager.hook.rlbridge_evaluated(run=run, step=resumed_step, reward=0.125)
    for step in range(resumed_step + 1, steps + 1):
        manager.hook.rlbridge_step_finished(
            run=run, metrics={"step": step, "reward_mean": step / 10, "tokens_per_second": 12_345.6}
        )
        manager.hook.rlbridge_weights_committed(run=run, report=SimpleNamespace(seconds=0.0123))
    manager.hook.rlbridge_run_finished(run=run, result=result)
    return screen.getvalue()


def test_without_a_terminal_there_is_one_line_a_step():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "run [a] in runs/[a]"
    assert [line[:8] for line in lines if line.startswith("step ")] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "reward 0.200  held-out 0.125  sync 12 ms  12,346 tokens/s" in lines[3]


def test_quick_steps_do_not_flood_a_log_but_first_and_last_are_shown():
    lines = shown(terminal=False, steps=9, resumed_step=3, every_seconds=60).splitlines()
    assert "going on after step 3" in lines[0]
    assert [line[:8] for line in lines if line.startswith("step ")] == ["step 4/9", "step 9/9"]


def test_on_a_terminal_one_line_is_updated():
    screen = shown(terminal=True)
    assert "3/3" in screen
    assert "held-out 0.125" in screen
    assert "\x1b[?25h" in screen.rpartition("\x1b[?25l")[2], "the cursor is shown again"


def test_the_verdict_says_reward_syncs_wire_and_time():
    assert verdict(RESULT) == [
        "reward 0.250 -> 0.750 (best 0.875) in 3 steps",
        "4 syncs, every one verified, 1.5 MB each, 12 ms (p50), 20 ms (p95)",
        "native -> nixl -> vllm, wire cma",
        "9.0 s in all",
    ]
    assert "reward 0.250 -> 0.750" in shown(terminal=False)


def test_syncs_that_were_not_verified_are_not_passed_over():
    assert "NOT ALL VERIFIED" in verdict(RESULT | {"verified": False})[1]


def test_a_run_that_failed_early_still_ends():
    assert verdict({}) == []
    assert "runs/[a]" in shown(terminal=True, steps=0, result={"reward": {"first": None}, "syncs": 0}).splitlines()[-1]


def test_observing_imports_neither_ray_nor_torch():
    modules = "rlbridge.rl.run, rlbridge.observe.files, rlbridge.observe.progress, rlbridge.rl.summary"
    code = f"import sys, {modules}; assert not {{'ray', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
