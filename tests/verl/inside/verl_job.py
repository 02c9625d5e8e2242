"""A verl job on a CPU, out of verl's own parts: trainer ranks with the FSDP2 engine, rollout workers, the manager between them.

What serves is a transformers model in the rollout worker itself: vLLM and SGLang, which verl would have there, are of other
environments.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.config import CheckpointConfig
from verl.workers.config import (
    ActorConfig,
    CheckpointEngineConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    RolloutConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.rollout import BaseRollout, RolloutReplica
from verl.workers.rollout.replica import RolloutMode
from verl.workers.utils.losses import ppo_loss

from rlbridge_verl import cpu_platform
from rlbridge_verl.batches import batch_as_tensordict
from tests.native.ranks import make_batch

ROOT = Path(__file__).parents[3]
_FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
_SETTINGS = {
    "use_remove_padding": False,
    "use_dynamic_bsz": False,
    "micro_batch_size_per_gpu": 4,
    "use_fused_kernels": False,
    "global_batch_size": 8,
    "pad_token_id": 0,
}


def new_engine(backend: str, megabytes: int, options: dict[str, Any], *, is_master: bool = False) -> Any:
    """A checkpoint engine as verl's workers make it. verl's own `nixl` gets what it lacks on a CPU."""
    if backend == "nixl":
        _nixl_on_a_cpu()
        options = {"device": "cpu", **options}
    given = {"is_master": True} if is_master else {}
    return CheckpointEngineRegistry.new(backend, bucket_size=megabytes << 20, **given, **options)


def _nixl_on_a_cpu() -> None:
    """verl's nixl engine wants cupy, pinned memory and CUDA's synchronize: stand-ins, for comparing alone."""
    if "cupy" not in sys.modules:
        cupy = types.ModuleType("cupy")
        cupy.ndarray = type("ndarray", (), {})  # type: ignore[attr-defined]
        sys.modules["cupy"] = cupy
    module = importlib.import_module("verl.checkpoint_engine.nixl_checkpoint_engine")
    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    stand_in.zeros = lambda *sizes, pin_memory=False, **kwargs: torch.zeros(*sizes, **kwargs)
    stand_in.cuda = types.SimpleNamespace(synchronize=lambda *_: None)
    module.torch = stand_in  # type: ignore[attr-defined]


class Trainer(TrainingWorker):  # type: ignore[misc]
    """A trainer rank, with a checkpoint engine as verl's actor worker has one."""

    def __init__(self, config: Any, wire: Any) -> None:
        torch.set_num_threads(1)
        cpu_platform.register_engines()
        ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("gloo", **ranks)
        super().__init__(config)
        self._steps = 0
        options = wire.engine_kwargs.get(wire.backend, {})
        self.use(wire.backend, wire.update_weights_bucket_megabytes, options)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def use(self, backend: str, megabytes: int, options: dict[str, Any]) -> None:
        self.checkpoint_engine = new_engine(backend, megabytes, options, is_master=dist.get_rank() == 0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        weights, _ = self.engine.get_per_tensor_param()
        return await self.checkpoint_engine.send_weights(weights, global_steps=global_steps) or {}

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self.checkpoint_engine, method)(*arguments, **named)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def train(self) -> float:
        """One step of verl's engine with verl's loss; the weights move."""
        self._steps += 1
        rank, ranks = dist.get_rank(), dist.get_world_size()
        data = batch_as_tensordict(make_batch(seed=self._steps).shard(rank, ranks), None, _SETTINGS)
        config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=4, engine=self.engine.engine_config)
        with self.engine.train_mode():
            output = self.engine.train_batch(data, loss_function=partial(ppo_loss, config))
        return float(output["metrics"]["grad_norm"])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.get_per_tensor_param()[0]}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def memory(self) -> tuple[str, int]:
        """The epoch, and where this rank's arena is: the same as long as nothing is registered anew."""
        epoch = self.checkpoint_engine._epoch
        return epoch.name, min(stripe.data_ptr() for stripes in epoch.end._stripes for stripe in stripes)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def disturb(self, how: str, rank: int) -> None:
        """Let a rank do wrong from the next sync on: "flip" a byte after it was hashed, "die" when it is to be; "" mends it."""
        from rlbridge_verl.wire import source

        original = getattr(source, "_rlbridge_digests", source.digests)
        source._rlbridge_digests = original  # type: ignore[attr-defined]
        source.digests = original
        if rank != dist.get_rank() or not how:
            return

        def flip(stripes: Any) -> list[bytes]:
            found = original(stripes)
            stripes[-1][-1] ^= 1
            return found

        def die(_: Any) -> list[bytes]:
            os._exit(1)

        source.digests = {"flip": flip, "die": die}[how]


class Serving(BaseRollout):  # type: ignore[misc]
    """verl's adapter of a server, and the server: a transformers model."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(config, model_config, None)
        torch.set_num_threads(1)
        self.replica_rank, self.is_leader_rank = replica_rank, True
        self.model = AutoModelForCausalLM.from_pretrained(model_config.path, dtype=getattr(torch, config.dtype)).eval()
        self.version: int | None = None
        self.disturbed: tuple[int, str] = (-1, "")

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Nothing is."""

    @torch.no_grad()
    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: Any = None, **_: Any
    ) -> None:
        state = self.model.state_dict()
        count = 0
        async for name, tensor in weights:
            state[name].copy_(tensor)
            count += 1
            if count == self.disturbed[0]:
                self._disturb()
        assert count == len(state)
        self.version = global_steps

    def _disturb(self) -> None:
        (_, how), self.disturbed = self.disturbed, (-1, "")
        if how == "raise":
            raise RuntimeError("the server does not take it")
        os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


class RolloutWorker(CheckpointEngineWorker):  # type: ignore[misc]
    """verl's rollout worker, which can also be asked what it serves."""

    def __init__(self, rollout_config: Any, model_config: Any, replica_rank: int) -> None:
        serving = Serving(rollout_config, model_config, replica_rank)
        super().__init__(rollout_config, model_config, server_adapter=serving)

    def use(self, backend: str, megabytes: int, options: dict[str, Any]) -> None:
        self.checkpoint_engine = new_engine(backend, megabytes, options)

    def served(self) -> tuple[int | None, dict[str, torch.Tensor]]:
        adapter = self.server_adapter
        return adapter.version, {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}

    def disturb(self, how: str, tensor: int = 3) -> int:
        """At that tensor of the next sync "die", "stop" or "raise". Returns the id of this process."""
        self.server_adapter.disturbed = (tensor, how)
        return os.getpid()


class Replica(RolloutReplica):  # type: ignore[misc]
    """A replica of one rollout worker, on no GPU."""

    async def init_standalone(self) -> None:
        self.rollout_mode = RolloutMode.STANDALONE
        pool = RayResourcePool([self.world_size], use_gpu=False, max_colocate_count=1, name_prefix=f"pool_{self.replica_rank}")
        group = RayWorkerGroup(
            resource_pool=pool,
            ray_cls_with_init=self.get_ray_class_with_init_args(),
            bin_pack=False,
            name_prefix=f"rollout_{self.replica_rank}",
            use_gpu=False,
            device_name="cpu",
        )
        self.workers = group.workers
        await self.launch_servers()

    def get_ray_class_with_init_args(self) -> Any:
        cls = ray.remote(RolloutWorker)
        return RayClassWithInitArgs(
            cls=cls, rollout_config=self.config, model_config=self.model_config, replica_rank=self.replica_rank
        )

    async def launch_servers(self) -> None:
        """The worker serves itself."""


class Job:
    """Two trainer ranks and two replicas of a model, and verl's manager of the weights between them."""

    def __init__(self, model: Path, megabytes: int = 1, dtype: str = "float32", **options: Any) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        names = ("VERL_PLATFORM", "OMP_NUM_THREADS", "PYTHONPATH", "UCX_NET_DEVICES", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
        ray.init(
            num_cpus=8,
            object_store_memory=600 << 20,
            include_dashboard=False,
            log_to_driver=os.environ.get("RLBRIDGE_ACTOR_LOGS") == "1",
            runtime_env={"env_vars": {name: variables[name] for name in names}},
        )
        wire = CheckpointEngineConfig(
            backend="rlbridge", update_weights_bucket_megabytes=megabytes, engine_kwargs={"rlbridge": options}
        )
        shape = HFModelConfig(
            path=str(model),
            load_tokenizer=False,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        )
        engine = FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision=_FP32,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=4,
            infer_micro_batch_size_per_gpu=4,
        )
        training = TrainingWorkerConfig(
            model_type="language_model",
            model_config=shape,
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=100),
            checkpoint_config=CheckpointConfig(),
        )
        self.trainers = RayWorkerGroup(
            resource_pool=RayResourcePool([2], use_gpu=False, max_colocate_count=1, name_prefix="trainers"),
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(Trainer), config=training, wire=wire),
            use_gpu=False,
            device_name="cpu",
        )
        self.trainers.reset()
        rollout = RolloutConfig(name="hf", dtype=dtype, checkpoint_engine=wire, tensor_model_parallel_size=1)
        self.replicas = [Replica(rank, rollout, shape, gpus_per_node=1) for rank in range(2)]
        for replica in self.replicas:
            _run(replica.init_standalone())
        self.manager = CheckpointEngineManager(config=wire, actor_wg=self.trainers, replicas=list(self.replicas))

    def use(self, backend: str, megabytes: int, **options: Any) -> None:
        """Give every worker a new checkpoint engine."""
        self.manager.backend, self.manager.backend_cls = backend, type(new_engine(backend, megabytes, options))
        self.trainers.use(backend, megabytes, options)
        ray.get([worker.use.remote(backend, megabytes, options) for worker in self._workers()])

    def sync(self, version: int | None) -> dict[str, float]:
        """verl's own update of the weights."""
        return dict(_run(self.manager.update_weights(global_steps=version)))

    def served(self) -> list[tuple[int | None, dict[str, torch.Tensor]]]:
        """The version and the tensors of each replica of the manager."""
        return list(ray.get([worker.served.remote() for worker in self._workers()]))

    def disturb(self, replica: int, how: str) -> int:
        """Let a replica go wrong in the next sync. Returns the id of its process."""
        return int(ray.get(self.replicas[replica].workers[0].disturb.remote(how)))

    def end(self) -> None:
        """End all processes of the job."""
        ray.shutdown()

    def _workers(self) -> list[Any]:
        return [worker for replica in self.manager.replicas for worker in replica.workers]


def _run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine) if asyncio.iscoroutine(coroutine) else coroutine
