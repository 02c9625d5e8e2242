"""What of the OpenRLHF plugin needs no OpenRLHF: its listing, its environment, its options, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rlbridge.env.location import lock_text
from rlbridge.env.lockfile import pins
from rlbridge.plugins import registry
from rlbridge_openrlhf.environment import OPENRLHF
from rlbridge_openrlhf.options import OpenRLHFTrainerOptions


def test_the_plugin_is_listed_without_openrlhf() -> None:
    backend = registry().backend("trainer", "openrlhf")
    assert backend.tested == ("openrlhf>=0.11.2,<0.12", "deepspeed>=0.19,<0.20")
    assert backend.environments == ("openrlhf",)
    assert registry().options_model("trainer", "openrlhf") is OpenRLHFTrainerOptions
    heavy = {"torch", "transformers", "deepspeed", "openrlhf", "ray"}
    code = f"import rlbridge_openrlhf, rlbridge_openrlhf.options, sys; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_lock_has_what_openrlhf_pins_and_no_openrlhf() -> None:
    locked = pins(lock_text(OPENRLHF))
    assert locked["deepspeed"] == "0.19.6"
    assert locked["transformers"] == "5.15.0"
    assert locked["torch"] == "2.13.0"
    assert not {"openrlhf", "flash-attn", "vllm"} & locked.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero_stage": 1}, "zero_stage=1 is not supported: 2 and 3 are"),
        ({"zero_stage": 0}, "hold whole gradients on every rank"),
        ({"dtype": "float16"}, "Input should be 'float32' or 'bfloat16'"),
        ({"dual_clip": 0.5}, "Input should be greater than 1"),
        ({"entropy_coef": -1}, "Input should be greater than or equal to 0"),
        ({"weights": "full"}, "Input should be 'auto', 'sharded' or 'gathered'"),
        ({"ring_attn_size": 2}, "Extra inputs are not permitted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_cannot_be_met_are_refused_in_words(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OpenRLHFTrainerOptions(backend="openrlhf", **options)


@pytest.mark.parametrize("options", [{}, {"zero_stage": 3, "dtype": "bfloat16"}, {"dual_clip": 3.0, "entropy_coef": 0.0}])
def test_options_that_can_be_met_are_taken(options: dict[str, Any]) -> None:
    OpenRLHFTrainerOptions(backend="openrlhf", **options)
