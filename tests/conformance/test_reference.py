"""The reference backends: how they are listed, what they import, which models they read and that both score them right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlbridge.errors import ModelError
from tests.conformance.reference_parties import VOCABULARY, make_generator, make_trainer, some_sequences, transformers_logprobs
from tests.models import tiny_qwen3


@pytest.mark.usefixtures("registered")
def test_registry_lists_the_backends_without_importing_torch() -> None:
    code = (
        "import sys; from rlbridge.plugins import registry\n"
        "rows = [(r.role, r.importable) for r in registry().listing() if r.name == 'reference']\n"
        "models = [registry().options_model(role, 'reference') for role, _ in rows]\n"
        "assert rows == [('trainer', True), ('generator', True), ('transport', True)], rows\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backends_import_no_transformers_and_no_ray() -> None:
    modules = ", ".join(f"rlbridge_conformance.reference.{name}" for name in ("trainer", "generator", "transport"))
    code = f"import sys, {modules}\nassert not {{'transformers', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_scores_are_those_of_transformers(tmp_path: Path, tied: bool, tp: int) -> None:
    path = tiny_qwen3(tmp_path, tied=tied, vocab_size=VOCABULARY)
    sequences = some_sequences(temperature=0.7)
    expected_BT = transformers_logprobs(path, sequences)
    np.testing.assert_allclose(make_trainer(path).score(sequences), expected_BT, atol=1e-4)
    np.testing.assert_allclose(make_generator(path, tp=tp, batch=3).score(sequences), expected_BT, atol=1e-4)


def test_model_that_lacks_a_tensor_is_refused(untied: Path, tmp_path: Path) -> None:
    make_trainer(untied).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors")
    for make in (make_trainer, make_generator):
        with pytest.raises(ModelError) as error:
            make(tmp_path)
        assert error.value.where["tensor"] == "lm_head.weight"


def test_sharded_files_are_read(untied: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(untied).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = (make_trainer(path).tensors for path in (untied, tmp_path))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())
