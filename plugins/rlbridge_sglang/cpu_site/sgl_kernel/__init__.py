"""NOT SGLang's kernels: a stand-in with none of them, for SGLang on a CPU for which no kernels are published.

SGLang's CPU path imports names from `sgl_kernel` that it never calls where the CPU has no AMX: its layers then take their
own PyTorch code. Every name can be imported from here, and whatever is called says which kernel is missing. The one that
sampling from seeds needs is there, in PyTorch: see `sgl_kernel.murmur_hash`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .murmur_hash import murmur_hash32

__version__ = "0.0.0+rlbridge.none"

# SGLang registers CPU variants of ops under this name; without the library there is nothing to register them with.
_library: Any = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"SGLang has called its kernel sgl_kernel.{name}, and this environment has no kernels: it holds rlbridge's"
            " stand-in for CPUs without AMX. The model, or an engine option, needs a path that is not pure PyTorch."
        )

    missing.__name__ = missing.__qualname__ = name
    return missing
