"""Each shim is needed, does no more than it says, and is left out where it is not needed; and the drift guards."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from rlbridge.errors import ConfigError, PluginError
from rlbridge_openrlhf import shims

_processes = get_context("forkserver")
_processes.set_forkserver_preload(["torch", "transformers", "peft", "ray", "datasets"])


def in_a_fresh_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task` returns in a process that has imported neither OpenRLHF nor DeepSpeed."""
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        return pool.submit(task, *arguments).result()


def what_is_missing(module: str) -> str | None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name
    return None


@pytest.mark.parametrize(
    ("module", "missing"), [("openrlhf.models.ring_attn_utils", "flash_attn"), ("openrlhf.trainer.ray.utils", "vllm")]
)
def test_without_the_shims_openrlhf_cannot_be_imported(module: str, missing: str) -> None:
    assert in_a_fresh_process(what_is_missing, module) == missing


def left_behind() -> list[str]:
    import rlbridge_openrlhf.upstream  # noqa: F401

    return sorted(sys.modules)


def test_with_them_it_is_and_no_stand_in_stays() -> None:
    modules = in_a_fresh_process(left_behind)
    assert {"openrlhf.models.actor", "openrlhf.trainer.ray.ppo_actor", "openrlhf.models.ring_attn_utils"} <= set(modules)
    assert not [name for name in modules if name.split(".")[0] in ("flash_attn", "vllm")]


def import_beside_folders(place: str) -> bool:
    for name in ("vllm", "flash_attn"):
        Path(place, name).mkdir()
    sys.path.insert(0, place)
    import rlbridge_openrlhf.upstream

    return rlbridge_openrlhf.upstream.ActorPPOTrainer is not None


def test_a_folder_of_that_name_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """What conform and pytest put on the path is where the user stands."""
    assert in_a_fresh_process(import_beside_folders, str(tmp_path))


def what_others_see() -> tuple[bool, Any]:
    from transformers.utils import is_flash_attn_2_available

    from rlbridge_openrlhf import upstream

    logits, labels = torch.randn(1, 3, 5), torch.tensor([[1, 2, 3]])
    from openrlhf.models.utils import log_probs_from_logits

    found = log_probs_from_logits(logits, labels)  # by flash-attn's kernel where that can be imported
    wanted = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(found, wanted)
    try:
        importlib.import_module("openrlhf.models.ring_attn_utils").unpad_input()
    except PluginError as error:
        return is_flash_attn_2_available(), (str(error), upstream.Actor.__module__)
    return is_flash_attn_2_available(), None


def test_nobody_takes_flash_attention_for_there() -> None:
    available, refused = in_a_fresh_process(what_others_see)
    assert not available
    assert refused == ("packed samples and ring attention need flash-attn, which is not installed", "openrlhf.models.actor")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shims that `before_import` and `after_import` apply, without applying them."""
    applied: list[str] = []
    for name in ("import_without_flash_attn", "skip_vllm", "compile_no_collectives"):
        monkeypatch.setattr(shims, name, lambda name=name: applied.append(name))
    return applied


def test_what_is_there_is_left_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shims.before_import()
    shims.after_import()
    assert calls == ["import_without_flash_attn", "skip_vllm", "compile_no_collectives"]
    calls.clear()
    monkeypatch.setattr(shims, "missing_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shims.before_import()
    shims.after_import()
    assert calls == []


@pytest.mark.parametrize("gpu", [True, False])
def test_the_accelerator_is_named_where_there_is_none_alone(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    shims.choose_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == (None if gpu else "cpu")


def compatible() -> tuple[bool, bool]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import ops

    before = ops.__compatible_ops__.get("deepspeed_shm_comm", False)
    shims.compile_no_collectives()
    return bool(before), bool(ops.__compatible_ops__["deepspeed_shm_comm"])


def test_deepspeeds_own_collectives_are_switched_off() -> None:
    # Whether they were on says whether this machine has a compiler; that none was called, a test of training tells.
    assert in_a_fresh_process(compatible)[1] is False


def refused_device() -> str:
    from types import SimpleNamespace

    from rlbridge_openrlhf.strategy import Strategy

    strategy = object.__new__(Strategy)
    strategy._context = SimpleNamespace(device="cuda")  # of a trainer that is to run on a GPU, in a process that sees none
    with pytest.raises(ConfigError) as caught:
        strategy.setup_distributed()
    return str(caught.value)


def test_a_device_that_deepspeed_has_not_chosen_is_refused() -> None:
    said = in_a_fresh_process(refused_device)
    assert "DeepSpeed has chosen cpu in a process whose trainer is to run on cuda" in said


def mends(generator: bool) -> bool:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers.integrations import deepspeed as hf_deepspeed

    if generator:

        def yields(model: Any, state_dict: Any, weight_mapping: Any) -> Iterator[Any]:
            yield from state_dict.items()

        hf_deepspeed._apply_weight_conversions_to_state_dict = yields
    return shims.mends_zero3_loading()


def test_openrlhfs_patch_of_loading_is_used_where_it_fits_alone() -> None:
    assert in_a_fresh_process(mends, False)
    assert not in_a_fresh_process(mends, True)


def test_a_package_that_openrlhf_does_not_have_is_named() -> None:
    with pytest.raises(PluginError, match=r"this OpenRLHF has no package openrlhf\.trainers"):
        shims._bare_package("openrlhf.trainers.ray")


def what_the_guards_say(*changes: tuple[str, str, Any]) -> str:
    shims.before_import()
    for module, path, value in changes:
        outer, _, name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), outer)
        delattr(owner, name) if value is None else setattr(owner, name, value)
    try:
        importlib.import_module("rlbridge_openrlhf.upstream")
    except PluginError as error:
        return str(error)
    return ""


def _another(self: Any, experience: Any, step: Any) -> None: ...


def test_the_installed_frameworks_have_all_that_is_called() -> None:
    assert in_a_fresh_process(what_the_guards_say) == ""


def test_a_changed_function_is_named_with_the_version() -> None:
    ppo_actor, engine = "openrlhf.trainer.ray.ppo_actor", "deepspeed.runtime.engine"
    said = in_a_fresh_process(what_the_guards_say, (ppo_actor, "ActorPPOTrainer.training_step", _another))
    assert said.startswith("openrlhf 0.11.2 is not what its plugin was written for: ActorPPOTrainer.training_step takes (self")
    assert "pip install 'openrlhf>=0.11.2,<0.12'" in said
    said = in_a_fresh_process(what_the_guards_say, (engine, "DeepSpeedEngine.set_gradient_accumulation_boundary", None))
    assert "deepspeed 0.19.6 is not what its plugin was written for" in said
    assert "DeepSpeedEngine.set_gradient_accumulation_boundary of deepspeed.runtime.engine is gone" in said


def check_a_changed_engine() -> str:
    from types import SimpleNamespace

    from rlbridge_openrlhf import seams

    engine = SimpleNamespace(
        optimizer=SimpleNamespace(overflow=False),
        zero_optimization_stage=lambda: 3,
        module=torch.nn.Linear(1, 1),
    )
    with pytest.raises(PluginError) as caught:
        seams.check_engine(engine)
    return str(caught.value)


def test_what_no_signature_shows_is_looked_for_too() -> None:
    said = in_a_fresh_process(check_a_changed_engine)
    for gone in ("SimpleNamespace.averaged_gradients", "a parameter's ds_tensor", "a parameter's ds_shape"):
        assert gone in said
    assert "SimpleNamespace.overflow" not in said
