"""What of the verl plugin needs no verl: its listing, its options, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rlbridge.plugins import registry
from rlbridge_verl.options import VerlTrainerOptions

GPUS = {"resources": {"gpus": 1}}


def test_the_plugin_is_listed_without_verl() -> None:
    backend = registry().backend("trainer", "verl")
    assert backend.tested == ("verl>=0.9,<0.10",)
    assert backend.environments == ("verl",)
    assert registry().options_model("trainer", "verl") is VerlTrainerOptions
    code = "import rlbridge_verl, rlbridge_verl.options, sys; sys.exit(bool({'torch', 'verl', 'ray'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "megatron", "dtype": "bfloat16"}, "strategy=megatron needs GPUs"),
        ({"strategy": "fsdp"}, "strategy=fsdp needs GPUs"),
        ({"strategy": "ddp"}, "Input should be 'fsdp2', 'fsdp' or 'megatron'"),
        ({"strategy": "megatron", **GPUS}, "set dtype=bfloat16"),
        ({"lora_rank": 8}, "verl-project/verl#7495"),
        ({"lora_rank": 8, "lora_merge": True, "weights": "sharded"}, "LoRA's merged weights are computed"),
        ({"lora_rank": 8, "lora_merge": True, "strategy": "megatron", "dtype": "bfloat16", **GPUS}, "not supported"),
        ({"strategy": "fsdp", "weights": "sharded", **GPUS}, "strategy=fsdp has none"),
        ({"tensor_model_parallel_size": 2}, "is an option of strategy=megatron"),
        ({"ulysses_sequence_parallel_size": 2, "workers": 2}, "attn_implementation=flash_attention_2"),
        (
            {"strategy": "megatron", "dtype": "bfloat16", "tensor_model_parallel_size": 2, "workers": 3, **GPUS},
            "workers=3 is no multiple of 2",
        ),
        ({"engine_config": {"model_dtype": "fp16"}}, "model_dtype is set by trainer.dtype"),
        ({"engine_config": {"fsdp_size": 2}}, "fsdp_size is set by trainer.fsdp_size"),
        ({"engine_config": {"forward_only": True}}, "rlbridge's own to set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_go_together_are_refused_in_words(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VerlTrainerOptions(backend="verl", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "megatron", "dtype": "bfloat16", "tensor_model_parallel_size": 2, "workers": 4, **GPUS},
        {"strategy": "fsdp", **GPUS},
        {"lora_rank": 8, "lora_merge": True},
        {"engine_config": {"forward_prefetch": True}},
        {"ulysses_sequence_parallel_size": 2, "workers": 2, "attn_implementation": "flash_attention_2", **GPUS},
    ],
)
def test_options_that_go_together_are_taken(options: dict[str, Any]) -> None:
    VerlTrainerOptions(backend="verl", **options)
