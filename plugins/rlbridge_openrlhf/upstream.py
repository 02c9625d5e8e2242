"""The only place that OpenRLHF and DeepSpeed are imported from: with the shims, and looked at before they are used."""

# ruff: noqa: E402  (the order is what this module is for)

from __future__ import annotations

from rlbridge_openrlhf import seams, shims

shims.before_import()

import deepspeed

shims.after_import()
seams.check()

from deepspeed.accelerator import get_accelerator
from openrlhf.models import Actor, PolicyLoss
from openrlhf.models.actor import _patch_zero3_weight_mapping as mend_zero3_loading
from openrlhf.models.utils import set_z3_leaf_modules
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from openrlhf.utils.deepspeed import DeepspeedStrategy
from transformers.integrations.deepspeed import HfDeepSpeedConfig

__all__ = [
    "Actor",
    "ActorPPOTrainer",
    "DeepspeedStrategy",
    "Experience",
    "HfDeepSpeedConfig",
    "PolicyLoss",
    "deepspeed",
    "get_accelerator",
    "mend_zero3_loading",
    "set_z3_leaf_modules",
]
