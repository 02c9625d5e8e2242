"""What OpenRLHF and DeepSpeed take for granted of a machine and this trainer never uses: left out where it is not there.

Everything is decided by what is found, never by where it runs, so the same code is right on a GPU. Call `before_import` before
anything of DeepSpeed or OpenRLHF is imported, and `after_import` when DeepSpeed has been.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from rlbridge.errors import PluginError
from rlbridge.importing import missing_module

_FLASH_ATTN = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}
"""What `openrlhf.models.ring_attn_utils` imports of flash-attn, for packed samples and ring attention alone."""


def before_import() -> None:
    """Make OpenRLHF importable here, where it is installed."""
    choose_accelerator()
    if missing_module("openrlhf"):
        return
    if missing_module("flash_attn"):
        import_without_flash_attn()
    if missing_module("vllm"):
        skip_vllm()


def after_import() -> None:
    """Keep DeepSpeed from compiling anything where there is no GPU; no stand-in is left."""
    # They were taken away. Once one was there again: whoever saves sys.modules and puts it back undoes that.
    for name in (*_FLASH_ATTN, "openrlhf.models"):
        if name in sys.modules and getattr(sys.modules[name], "__file__", None) is None:
            del sys.modules[name]
    if not torch.cuda.is_available():
        compile_no_collectives()


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none: it would guess so too, and warn on every rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def compile_no_collectives() -> None:
    """Leave collectives to gloo: DeepSpeed compiles its own for CPUs when it starts, which takes minutes and a compiler."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_without_flash_attn() -> None:
    """Import the one module of OpenRLHF that needs flash-attn, with stand-ins for it that are then taken away.

    They must not stay: transformers asks whether flash_attn can be imported to choose an attention, and OpenRLHF to choose
    a kernel for log-probs.
    """
    if "openrlhf.models.ring_attn_utils" in sys.modules:
        return
    stand_ins = {name: _stand_in(name, functions) for name, functions in _FLASH_ATTN.items()}
    with _modules(stand_ins | {"openrlhf.models": _bare_package("openrlhf.models")}):
        importlib.import_module("openrlhf.models.ring_attn_utils")


def skip_vllm() -> None:
    """Skip what `openrlhf.trainer.ray` imports first, OpenRLHF's generators, which want vLLM; its modules stay importable."""
    sys.modules.setdefault("openrlhf.trainer.ray", _bare_package("openrlhf.trainer.ray"))


def mends_zero3_loading() -> bool:
    """Whether OpenRLHF's patch of transformers' loading for ZeRO-3 fits: it takes the function that it wraps to return a dict.

    In transformers 5.15, which OpenRLHF pins, it does; later it is a generator, and the patch an AttributeError.
    """
    from transformers.integrations import deepspeed

    convert = getattr(deepspeed, "_apply_weight_conversions_to_state_dict", None)
    return convert is not None and not inspect.isgeneratorfunction(inspect.unwrap(convert))


def _stand_in(name: str, functions: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    for function in functions:
        setattr(module, function, _refuse)
    return module


def _refuse(*_: Any, **__: Any) -> Any:
    raise PluginError("packed samples and ring attention need flash-attn, which is not installed")


def _bare_package(name: str) -> ModuleType:
    """The package, with its modules and without what its __init__ does."""
    home: list[str] = []
    for part in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:part]), home or None)
        if spec is None or not spec.submodule_search_locations:
            raise PluginError(f"this OpenRLHF has no package {name}", todo="pip install 'openrlhf>=0.11.2,<0.12'")
        home = list(spec.submodule_search_locations)
    module = ModuleType(name)
    module.__spec__ = spec
    module.__path__ = home
    return module


@contextmanager
def _modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
