"""OpenRLHF's own training step, without the job around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rlbridge.roles.trainer import AlgorithmOptions
from rlbridge_openrlhf.options import OpenRLHFTrainerOptions
from rlbridge_openrlhf.strategy import Strategy
from rlbridge_openrlhf.upstream import ActorPPOTrainer, PolicyLoss

_MEANS = {"ppo_clip_ratio": "clip_fraction", "ppo_kl": "ppo_kl"}
"""OpenRLHF's means over the tokens of a micro-batch, and what they are called in a run."""

_PARTS = {"kl": "kl", "entropy_loss": "entropy"}
"""Its sums over a micro-batch's tokens, divided by those of the global batch and times the ranks."""


class Policy(ActorPPOTrainer):  # type: ignore[misc]
    """What `ActorPPOTrainer.training_step` reads. Its constructor is left out: that asks for CUDA, and connects to vLLM."""

    def __init__(
        self, strategy: Strategy, actor: Any, schedule: Any, algorithm: AlgorithmOptions, options: OpenRLHFTrainerOptions
    ) -> None:
        self.strategy, self.args = strategy, strategy.args
        self.actor, self.ema_model = actor, None
        self.actor_optim, self.actor_scheduler = actor.model.optimizer, schedule
        self.actor_loss_fn = PolicyLoss(algorithm.clip_low, algorithm.clip_high, dual_clip=options.dual_clip)
        self.aux_loss = False
        self.replay_buffer = None
        self._kl_coef = algorithm.kl_coef

    def micro_batch(self, experience: Any, total_tokens: int) -> dict[str, float]:
        """One micro-batch, and after the last of a step the optimizer's step. Returns its part of the step's metrics."""
        normalisers = {
            "dp_size": self.strategy.world_size,
            "batch_num_tokens": max(total_tokens, 1),
            "global_batch_size": len(experience.sequences) * self.strategy.world_size,
        }
        # OpenRLHF compiles its entropy, for which a CPU needs a C++ compiler.
        eager = "force_eager" if experience.sequences.device.type == "cpu" else "default"
        with torch.compiler.set_stance(eager):
            status = self.training_step(experience, self._kl_coef, 0, normalisers)
        metrics, tokens = status["metrics"], status["num_action_tokens"]
        means = {ours: float(metrics[name]) * tokens / total_tokens for name, ours in _MEANS.items() if tokens}
        parts = {ours: float(metrics[name]) / self.strategy.world_size for name, ours in _PARTS.items() if name in metrics}
        return means | parts

    def metrics(self, micro_batches: list[dict[str, float]], lr: float) -> dict[str, float]:
        """Metrics of the global batch, the same on every rank. Collective."""
        names = ["clip_fraction", "ppo_kl"]
        names += ["kl"] if self.args.algo.kl.use_loss else []
        names += ["entropy"] if self.args.actor.entropy_coef is not None else []
        sums = torch.tensor([sum(part.get(name, 0.0) for part in micro_batches) for name in names], dtype=torch.float64)
        sums = sums.to(self.strategy.loss.device)
        dist.all_reduce(sums)
        found = {"loss": float(self.strategy.loss), "grad_norm": self.strategy.norm, "lr": lr}
        return found | dict(zip(names, sums.tolist(), strict=True))
