"""What the tests let a trainer rank do, in its own process: found there by this module's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rlbridge.errors import CheckpointError, RlbridgeError
from rlbridge.roles.batch import Batch
from rlbridge_verl.trainer import VerlTrainer
from tests.native.ranks import make_batch


def forbid_gathers(trainer: VerlTrainer) -> None:
    """A full tensor of a sharded parameter is made by this alone."""
    from torch.distributed.tensor import DTensor

    source = trainer.weights()
    snapshot = type(source).snapshot
    full_tensor = DTensor.full_tensor

    def refuse(self: Any, **_: Any) -> Any:
        raise AssertionError("a tensor was gathered to be published")

    def without_gathers(self: Any, destinations: Any) -> None:
        DTensor.full_tensor = refuse
        try:
            snapshot(self, destinations)
        finally:
            DTensor.full_tensor = full_tensor

    type(source).snapshot = without_gathers  # type: ignore[method-assign]


def kl_of_two_steps(trainer: VerlTrainer) -> list[float]:
    batch = make_batch().shard(dist.get_rank(), dist.get_world_size())
    return [trainer.train_step(batch)["kl"] for _ in range(2)]


def break_a_step(trainer: VerlTrainer, path: Path, batch: Batch) -> float:
    with pytest.raises(RlbridgeError, match="the weights are untouched"):
        trainer.train_step(batch.shard(dist.get_rank(), dist.get_world_size()))
    trainer.save(path)
    return float(trainer.train_step(make_batch().shard(dist.get_rank(), dist.get_world_size()))["lr"])


def load_only(trainer: VerlTrainer) -> None:
    """Setting it up is what is tested."""


def save_the_state(trainer: VerlTrainer, path: Path) -> None:
    trainer.train_step(make_batch().shard(dist.get_rank(), dist.get_world_size()))
    trainer.save_state(path)


def load_the_state(trainer: VerlTrainer, path: Path) -> str:
    try:
        trainer.load_state(path)
    except CheckpointError as error:
        return str(error)
    return ""


def stand_in() -> None:
    """Register it, in a rank that has not set up its trainer yet."""
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    class StandInForMegatron(FSDPEngineWithLMHead):  # type: ignore[misc]
        def __init__(self, engine_config: Any, optimizer_config: Any, **configs: Any) -> None:
            assert isinstance(engine_config, McoreEngineConfig)
            assert isinstance(optimizer_config, McoreOptimizerConfig)
            assert (engine_config.tensor_model_parallel_size, engine_config.use_distributed_optimizer) == (2, True)
            fsdp = FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype="bf16",
                mixed_precision={"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                use_torch_compile=False,
                use_remove_padding=engine_config.use_remove_padding,
            )
            adam = FSDPOptimizerConfig(
                lr=optimizer_config.lr,
                betas=optimizer_config.betas,
                weight_decay=optimizer_config.weight_decay,
                clip_grad=optimizer_config.clip_grad,
                lr_warmup_steps=optimizer_config.lr_warmup_steps,
                override_optimizer_config={"eps": optimizer_config.override_optimizer_config["adam_eps"]},
            )
            super().__init__(engine_config=fsdp, optimizer_config=adam, **configs)

        def get_data_parallel_size(self) -> int:
            return 1

        def get_data_parallel_rank(self) -> int:
            return 0

        def get_data_parallel_group(self) -> Any:
            return self._group_of_one()

        def is_mp_src_rank_with_outputs(self) -> bool:
            return bool(self.rank == 0)

        def _group_of_one(self) -> Any:
            import torch.distributed as dist

            if not hasattr(self, "_own"):
                groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
                self._own = groups[self.rank]
            return self._own

    known = EngineRegistry._engines["language_model"].setdefault("megatron", {})
    known["cpu"] = StandInForMegatron


def score(trainer: VerlTrainer) -> Any:
    return trainer.score(make_batch(rows=4).sequences)
