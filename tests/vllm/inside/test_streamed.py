"""Engines that load weights anew in each update, since kernels keep them in another form, or because they are told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from rlbridge.errors import LayoutError
from rlbridge.roles.batch import pad_sequences
from rlbridge.sync.messages import Described, Digests, Nothing, Record, pack, result
from rlbridge.weights.layout import TensorMeta
from rlbridge.weights.model_files import checkpoint_of
from rlbridge_vllm import cpu
from rlbridge_vllm.streamed import StreamedSink
from tests.vllm.inside import models
from tests.vllm.inside.bridge import Bridge, started

TOLERANCE = 5e-5
PROMPTS = [[5, 9, 17], [8, 23, 31, 44], [50, 2, 45], [14, 39, 27, 60, 71]]

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "told to": ("qwen2-tied", {"install": "streamed"}),
    "packed on a CPU": ("qwen3", {"cpu_prepack": True}),
    "packed and tied, on two ranks": ("qwen3-one-kv-head", {"cpu_prepack": True, "tensor_parallel": 2}),
    "experts": ("qwen3-moe", {"install": "streamed"}),
    "experts on two ranks": ("qwen3-moe", {"install": "auto", "tensor_parallel": 2}),
    "packed experts, in process": ("qwen3-moe", {"cpu_prepack": True, "engine": "in_process"}),
}


@pytest.fixture(scope="module", params=ENGINES)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    kind, options = ENGINES[request.param]
    made = Bridge(tmp_path_factory.mktemp("models") / kind, kind, **options)
    yield made
    made.close()


def test_log_probs_are_those_of_transformers_after_every_sync(bridge: Bridge) -> None:
    """Over weights that are none: what kernels hold cannot be read back, so log-probs have to show that all was loaded."""
    assert set(bridge.generator.installs) == {"streamed"}
    for seed in range(3):
        models.move(bridge.model, seed)
        if bridge.version:
            bridge.scramble()
        bridge.sync()
        said = bridge.say(PROMPTS, temperature=1.0, seed=seed)
        sequences = pad_sequences(PROMPTS, [c.token_ids for c in said])
        wanted, mask = models.scores(bridge.model, sequences), sequences.completion_mask_BT()
        assert np.abs(bridge.engine.score(sequences) - wanted).max() <= TOLERANCE
        assert max(np.abs(np.subtract(c.logprobs, w[m])).max() for c, w, m in zip(said, wanted, mask, strict=True)) <= TOLERANCE
        assert {version for completion in said for version in completion.versions} == {bridge.version}


def test_what_can_no_longer_be_shown_is_not_shown(bridge: Bridge) -> None:
    """Digests are of what vLLM was given; when the next version arrives in its place there is nothing to look at."""
    bridge.sync()
    assert len(_digests(bridge)) == len(bridge.generator.installs)
    bridge.version += 1
    bridge.session.publish(bridge.version)
    bridge.session.pull(bridge.version)
    with pytest.raises(LayoutError, match="in the form of its kernels"):
        _digests(bridge)
    bridge.session.install(bridge.version)
    _digests(bridge)


def test_another_models_tensors_are_refused_by_name(bridge: Bridge) -> None:
    published = bridge.published()
    norm = "model.layers.1.post_attention_layernorm.weight"
    changed = {
        norm: [t for t in published if t.name != norm],
        "model.layers.7.mlp.up_proj.weight": [*published, TensorMeta("model.layers.7.mlp.up_proj.weight", (4, 4), "float32")],
        "model.norm.weight": [TensorMeta(t.name, (7,), t.dtype) if t.name == "model.norm.weight" else t for t in published],
    }
    for name, tensors in changed.items():
        reply = bridge.engine.handle("record", msgspec.msgpack.encode([pack(Record(tensors))]))[0]
        with pytest.raises(LayoutError) as raised:
            result(reply, Described)
        assert raised.value.where["tensor"] == name


def test_weights_in_another_form_are_not_copied_into(tmp_path: Path) -> None:
    models.make(tmp_path, "qwen3")
    with pytest.raises(LayoutError, match="install to auto or streamed") as raised:
        started(tmp_path, install="direct", cpu_prepack=True, engine="in_process")
    assert raised.value.where["tensor"].startswith("model.layers.0.")


def test_a_vllm_that_does_not_load_again_what_it_has_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a CPU, without the measure that has it pack experts in updates: bytes and digests would all be right."""
    models.make(tmp_path, "qwen3-moe")
    monkeypatch.setattr(cpu, "pack_experts_again", lambda: None)
    setup = UnquantizedFusedMoEMethod._setup_kernel
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "_setup_kernel", getattr(setup, "of_vllm", setup))
    with pytest.raises(LayoutError, match="something else of its own weights") as raised:
        started(tmp_path)
    assert "experts" in raised.value.where["tensor"]


def test_what_vllm_keeps_wider_than_the_model_comes_so(tmp_path: Path) -> None:
    model = torch.nn.Module()
    for name, dtype in {"plain": torch.bfloat16, "bias": torch.float32}.items():
        setattr(model, name, torch.nn.Parameter(torch.ones(4, dtype=dtype)))
    save_file({name: parameter.data for name, parameter in model.named_parameters()}, tmp_path / "model.safetensors")
    sink = StreamedSink(_Worker(model), checkpoint_of(str(tmp_path)))
    for published, wanted in {"float32": "float32", "bfloat16": "bfloat16"}.items():
        layout = sink.record([TensorMeta(name, (4,), published) for name in ("plain", "bias")])
        assert [meta.dtype for meta in layout.tensors] == ["bfloat16", wanted]


class _Worker:
    """A worker of vLLM's whose model takes what it is given."""

    device = torch.device("cpu")
    model_config = SimpleNamespace(dtype=torch.bfloat16)

    def __init__(self, model: torch.nn.Module) -> None:
        self.get_model = lambda: model

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update: dict[str, Any]) -> None:
        for name, tensor in update["weights"]():
            getattr(self.get_model(), name).data.copy_(tensor)

    def finish_weight_update(self) -> None:
        pass


def _digests(bridge: Bridge) -> list[bytes]:
    replies = bridge.engine.handle("live_digests", msgspec.msgpack.encode([pack(Nothing())]))
    return [result(reply, Digests).joined for reply in replies]
