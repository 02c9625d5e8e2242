"""What of the vLLM plugin needs no vLLM: its options, its environment, what it reads of a model's directory, its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from rlbridge.errors import ConfigError, ModelError
from rlbridge.plugins import registry
from rlbridge_vllm import rlbridge_environments
from rlbridge_vllm.model_files import check_directory, checkpoint_bytes, has_tokenizer
from rlbridge_vllm.options import VllmGeneratorOptions, share_of_vllm
from rlbridge_vllm.processes import Watch
from rlbridge_vllm.tail import last_words


def options(**given: Any) -> VllmGeneratorOptions:
    return VllmGeneratorOptions(backend="vllm", **given)


def test_the_plugin_is_listed_without_vllm() -> None:
    backend = registry().backend("generator", "vllm")
    assert registry().options_model("generator", "vllm") is VllmGeneratorOptions
    assert backend.environments == tuple(environment.name for environment in rlbridge_environments())
    code = "import rlbridge_vllm, sys; assert not {'torch', 'vllm', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("tensor_parallel_size", "generator.tensor_parallel"),
        ("dtype", "generator.dtype"),
        ("logprobs_mode", "rlbridge's own"),
        ("speculative_config", "rlbridge's own"),
        ("enable_eplb", "rlbridge's own"),
    ],
)
def test_an_argument_that_rlbridge_sets_is_refused_by_name(key: str, told: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} is .*{told}"):
        options(engine_args={key: 1})
    assert options(engine_args={"max_num_seqs": 8}).engine_args == {"max_num_seqs": 8}


def test_a_rank_needs_a_gpu_of_its_own() -> None:
    with pytest.raises(ValidationError, match="tensor_parallel=4 needs as many GPUs"):
        options(tensor_parallel=4, resources={"gpus": 2})
    assert options(tensor_parallel=4).resources.gpus == 0
    assert options(tensor_parallel=4, resources={"gpus": 4}).tensor_parallel == 4


def test_vllm_leaves_room_for_the_arena_of_its_updates() -> None:
    gib = 2**30
    assert share_of_vllm(options(), 16 * gib, 80 * gib) == pytest.approx(0.7)
    assert share_of_vllm(options(tensor_parallel=2), 16 * gib, 80 * gib) == pytest.approx(0.8)
    assert share_of_vllm(options(tensor_parallel=2, install="streamed"), 16 * gib, 80 * gib) == pytest.approx(0.7)
    with pytest.raises(ConfigError, match=r"takes 75\.0 GiB on each GPU of 80 GiB"):
        share_of_vllm(options(), 75 * gib, 80 * gib)


def test_the_bytes_of_a_checkpoint_are_those_that_are_served(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int32), "c": torch.zeros(7).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint_bytes(str(tmp_path), "bfloat16") == 12 * 2 + 5 * 4 + 7
    assert checkpoint_bytes(str(tmp_path / "none"), "bfloat16") == 0


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as raised:
        check_directory(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        check_directory(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    check_directory(str(tmp_path))
    check_directory("acme/model-of-the-hub")
    assert not has_tokenizer(str(tmp_path))
    assert has_tokenizer("acme/model-of-the-hub")


def test_the_last_words_of_an_engine_are_its_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(str(log)) == ""
    log.write_text("Worker WARNING slow\n")
    assert last_words(str(log)) == "Worker WARNING slow"
    log.write_text(
        "Worker ERROR it failed\nTraceback\n  File x\nacme.BadError: first\nCore ERROR\nException: then\nacme.BadError: first\n"
    )
    assert last_words(str(log)) == "acme.BadError: first\nException: then"


def test_the_first_of_several_processes_to_end_is_known() -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    watch = Watch({f"rank[{index}]": process.pid for index, process in enumerate(processes)})
    try:
        assert (watch.lost(), watch.stopped()) == ([], [])
        processes[1].kill()
        assert _eventually(lambda: watch.lost() == ["rank[1]"])
        os.kill(processes[2].pid, signal.SIGSTOP)
        assert _eventually(lambda: watch.stopped() == ["rank[2]"])
        watch.kill()
        assert watch.wait_for_the_end(5)
        assert watch.lost()[0] == "rank[1]"
    finally:
        watch.close()
        for process in processes:
            process.kill()
            process.wait()


def test_a_process_that_has_ended_before_it_is_watched_is_lost() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    watch = Watch({"rank[0]": process.pid})
    assert watch.lost() == ["rank[0]"]
    watch.close()


def test_a_process_ends_with_the_one_that_started_it() -> None:
    child = (
        "import time\nfrom rlbridge_vllm.processes import die_with_parent\n"
        "die_with_parent(); print(1, flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert _eventually(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _eventually(condition: Any, seconds: float = 5.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True
