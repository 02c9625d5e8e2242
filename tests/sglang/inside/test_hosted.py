"""The command line of an SGLang server with rlbridge's control in it; a real one is in tests/openai."""

from __future__ import annotations

import pytest

from rlbridge.errors import ConfigError
from rlbridge_sglang import hosted
from tests.sglang.inside import models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "llama"
    models.make(path, "llama")
    return str(path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--dp-size", "2"], "dp_size cannot be set: one engine is one model"),
        (["--enable-lora"], "enable_lora cannot be set: a sync writes the model's own weights"),
        (["--sampling-backend", "flashinfer"], "only the sampling backend pytorch samples from seeds"),
    ],
)
def test_an_argument_that_a_run_cannot_do_with_is_refused(model: str, given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        hosted._arguments(["--model-path", model, "--device", "cpu", *given])


def test_what_is_given_comes_after_what_a_cpu_needs(model: str) -> None:
    found = hosted._arguments(["--model-path", model, "--device", "cpu", "--max-total-tokens", "100", "--tp-size", "2"])
    assert (found.attention_backend, found.sampling_backend) == ("torch_native", "pytorch")
    assert (found.max_total_tokens, found.max_running_requests, found.tp_size) == (100, 64, 2)
    assert not found.skip_tokenizer_init
