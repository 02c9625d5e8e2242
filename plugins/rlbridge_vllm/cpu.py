"""What is different where vLLM runs on CPUs: four measures, for tests and development. On GPUs none of this is applied."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
from typing import Any

PREPACK_VARIABLE = "RLBRIDGE_VLLM_PREPACK"
"""1: vLLM packs the weights of linear layers for its CPU kernels."""

EAGER_VARIABLE = "RLBRIDGE_VLLM_EAGER"
"""1: nothing is compiled."""


def apply() -> None:
    """Take all measures in this process. A second time changes nothing."""
    keep_linear_weights()
    pack_experts_again()
    fork_workers()
    if os.environ.get(EAGER_VARIABLE) == "1":
        compile_nothing()


def keep_linear_weights() -> None:
    """Leave the weights of linear layers where they are, as on a GPU.

    vLLM 0.32 packs them for its CPU kernels and puts empty parameters in their place: nothing could be written into those, and
    what is written into an output layer's weight would have no effect. `PREPACK_VARIABLE` is looked at for each layer.
    """
    import torch
    from vllm.model_executor.layers import utils

    packed = utils.dispatch_cpu_unquantized_gemm
    if getattr(packed, "of_rlbridge", False):
        return

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        if os.environ.get(PREPACK_VARIABLE) == "1":
            packed(layer, remove_weight)
        else:
            setattr(layer, "cpu_linear", torch.nn.functional.linear)  # noqa: B010  (no module, which mypy takes it for)

    dispatch.of_rlbridge = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch


def pack_experts_again() -> None:
    """Pack the weights of experts in updates too.

    vLLM 0.32 packs them for its CPU kernel when it first sets the kernel up, and in an update leaves them as they came, which
    the kernel then takes for packed ones.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel
    if hasattr(set_up, "of_vllm"):
        return

    def set_up_again(self: Any, *args: Any, **kwargs: Any) -> None:
        update = self.moe_kernel is not None
        set_up(self, *args, **kwargs)
        if update:
            layer = kwargs["layer"] if "layer" in kwargs else args[0]
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    set_up_again.of_vllm = set_up  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = set_up_again


def fork_workers() -> None:
    """Fork vLLM's processes: spawned ones import vLLM anew, which takes each of them 15 s of a core."""
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    for module in (utils, multiproc_executor):
        module.get_mp_context = _context


def compile_nothing() -> None:
    """Leave out what vLLM compiles although it is told not to: the ranks of log-probs, 20 s of the first request."""
    import torch._dynamo

    torch._dynamo.config.disable = True


class _Bound(multiprocessing.context.ForkProcess):
    """A child that ends with its parent."""

    def run(self) -> None:
        import vllm.plugins

        from rlbridge_vllm.processes import die_with_parent

        die_with_parent()
        vllm.plugins.plugins_loaded = False  # so that rlbridge's is called here too, after vLLM has set up its logging
        super().run()


class _ForkContext(multiprocessing.context.ForkContext):
    Process = _Bound


def _context() -> Any:
    return _ForkContext()
