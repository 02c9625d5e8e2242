"""OpenRLHF's DeepSpeed strategy of a run: made from our config, on any device, with steps that can be refused."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from rlbridge.errors import ConfigError, RlbridgeError
from rlbridge.roles.trainer import TrainerContext
from rlbridge_openrlhf.options import OpenRLHFTrainerOptions
from rlbridge_openrlhf.upstream import DeepspeedStrategy, deepspeed, get_accelerator

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


class Strategy(DeepspeedStrategy):  # type: ignore[misc]
    """OpenRLHF's strategy, whose `backward` and `optimizer_step` are what its training step calls.

    DeepSpeed is told of one micro-batch a step, so that it leaves losses as they are, and which of them is the last by
    `set_gradient_accumulation_boundary`: the number of micro-batches follows from each batch.

    Attributes:
        step: Number of the step that is being taken.
        is_last: Whether the micro-batch that is next is the step's last, after which the weights are changed.
        loss: This rank's part of the step's loss so far.
        norm: Norm of the last step's gradient, of the global batch.
    """

    def __init__(self, context: TrainerContext, options: OpenRLHFTrainerOptions) -> None:
        super().__init__(
            seed=context.seed,
            max_norm=context.optimizer.grad_clip,
            micro_train_batch_size=1,
            train_batch_size=context.world_size,
            zero_stage=options.zero_stage,
            args=_arguments(context, options),
        )
        self._context = context
        self._on_gpu = get_accelerator().device_name() == "cuda"
        self._torch_adam = (not self._on_gpu) if options.torch_adam is None else options.torch_adam
        self.step, self.is_last = 0, True
        self.loss = torch.zeros((), dtype=torch.float64, device=context.device)
        self.norm = 0.0

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        """Join the other ranks. OpenRLHF's own asks for CUDA, and for what torchrun sets.

        Raises:
            ConfigError: DeepSpeed has chosen another kind of device.
        """
        context = self._context
        chosen = get_accelerator().device_name()
        if chosen != context.device:
            raise ConfigError(
                f"DeepSpeed has chosen {chosen} in a process whose trainer is to run on {context.device}",
                todo="trainer.resources.gpus decides what a trainer is given, and DS_ACCELERATOR what DeepSpeed takes of it",
            )
        dist.init_process_group(
            "nccl" if context.device == "cuda" else "gloo",
            init_method=context.rendezvous,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timeout or timedelta(seconds=context.timeout_seconds),
        )
        # Without them DeepSpeed looks for MPI, although the group is there. Each rank has a process, and a GPU, of its own.
        told = {"RANK": context.rank, "WORLD_SIZE": context.world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "", "MASTER_PORT": ""}
        os.environ.update({name: str(value) for name, value in told.items()})
        deepspeed.init_distributed()
        self.world_size = context.world_size
        self.accumulated_gradient = 1

    def get_ds_train_config(self, optim_dict: dict[str, Any] | None = None, *, max_norm: float | None = None) -> dict[str, Any]:
        """OpenRLHF's config, with the AdamW that runs here."""
        if optim_dict is not None and self._torch_adam:
            optim_dict["params"]["torch_adam"] = True
        return self._waiting_for_each(super().get_ds_train_config(optim_dict, max_norm=max_norm))

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        """OpenRLHF's config of a model that is not trained."""
        return self._waiting_for_each(super().get_ds_eval_config(offload))

    def _waiting_for_each(self, config: dict[str, Any]) -> dict[str, Any]:
        """Have ZeRO-3 gather parameters one by one where there is no GPU.

        Several at once it starts together and waits for the last, which is enough on a stream, in order. gloo has none: a model
        with two parameters in one module, as experts are, was loaded with garbage in the first in about one of ten loads
        (DeepSpeed 0.19.6, `_allgather_params_coalesced`).
        """
        if not self._on_gpu:
            config["zero_optimization"]["stage3_allgather_sequential"] = True
        return config

    def backward(self, loss: torch.Tensor, model: Any, _optimizer: Any, **kwargs: Any) -> None:
        """Back-propagate, and add up the loss. It is given times the ranks, over which DeepSpeed averages gradients."""
        self.loss += loss.detach() / self.world_size
        super().backward(loss, model, _optimizer, **kwargs)

    def optimizer_step(self, _optimizer: Any, model: Any, _scheduler: Any, name: str = "model", **kwargs: Any) -> None:
        """Change the weights, after the last micro-batch and if loss and gradient are finite.

        DeepSpeed itself looks for numbers that are not finite with fp16 alone, and in bfloat16 with stage 2; elsewhere it would
        make all weights of them.

        Raises:
            RlbridgeError: they are not, on every rank; the weights are untouched.
        """
        engine = model.model
        if self.is_last:
            squares = torch.zeros((), dtype=torch.float32, device=self.loss.device)
            for gradients in engine.optimizer.averaged_gradients.values():
                for gradient in gradients or ():
                    squares += torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2
            found = torch.stack([self.loss, squares.double()])
            dist.all_reduce(found)
            loss, self.norm = float(found[0]), float(found[1].sqrt())
            if not (math.isfinite(loss) and math.isfinite(self.norm)):
                _skip_step(engine)
                raise RlbridgeError(
                    f"step {self.step}: the loss is {loss}, the gradient norm {self.norm}; the weights are untouched",
                    todo="lower optimizer.lr, or check the rewards and log-probs of this step",
                    role="trainer",
                    phase=f"step {self.step}",
                )
            self.loss.fill_(loss)
        super().optimizer_step(_optimizer, model, _scheduler, name=name, **kwargs)


def _skip_step(engine: Any) -> None:
    """Have DeepSpeed drop the gradients and leave weights, moments and schedule alone, as it does when fp16 overflows."""
    zero = engine.optimizer
    looks = getattr(zero, "check_grad_overflow", None)  # it would overrule what is set here
    zero.check_grad_overflow, zero.overflow = False, True
    try:
        engine.step()
    finally:
        zero.overflow = False
        if looks is not None:
            zero.check_grad_overflow = looks


def _arguments(context: TrainerContext, options: OpenRLHFTrainerOptions) -> SimpleNamespace:
    """What of OpenRLHF's command line its strategy and training step read."""
    return SimpleNamespace(
        local_rank=-1,
        optim="adam",
        ds=SimpleNamespace(
            param_dtype=_SHORT[options.dtype],
            zero_stage=options.zero_stage,
            adam_offload=False,
            zpg=1,
            grad_accum_dtype=options.grad_accum_dtype,
            overlap_comm=False,
            deepcompile=False,
            tensor_parallel_size=1,
            ring_attn_size=1,
            use_universal_ckpt=False,
            packing_samples=False,
        ),
        train=SimpleNamespace(dynamic_batch_enable=False),
        actor=SimpleNamespace(entropy_coef=options.entropy_coef, aux_loss_coef=0.0),
        algo=SimpleNamespace(
            kl=SimpleNamespace(
                use_loss=context.algorithm.kl_coef > 0,
                init_coef=context.algorithm.kl_coef,
                estimator="k3",
                unbiased_gradient=False,
            )
        ),
    )
