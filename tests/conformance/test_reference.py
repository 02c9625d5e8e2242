"""The reference backends: what the conformance suite stands on has to be right by itself."""

from __future__ import annotations

import ctypes
import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlbridge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeadlineError,
    LayoutError,
    ModelError,
    PeerLostError,
    RlbridgeError,
    TransportError,
)
from rlbridge.plugins import registry
from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences, pad_sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext
from rlbridge.roles.transport import Copy, TransportContext
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.reference import transport as wire
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.options import (
    ReferenceGeneratorOptions,
    ReferenceTrainerOptions,
    ReferenceTransportOptions,
)
from rlbridge_conformance.reference.trainer import ReferenceTrainer
from rlbridge_conformance.reference.transport import ReferenceTransport
from tests.models import tiny_qwen3

VOCABULARY = 64
LONG = 200
"""Tokens of a completion that a test interrupts."""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RLBRIDGE_PLUGINS", "rlbridge_conformance.reference")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with an extra tensor of every awkward kind."""
    path = tiny_qwen3(tmp_path_factory.mktemp("tied"), tied=True, vocab_size=VOCABULARY)
    extras = {
        "extra.scalar": torch.tensor(3.5),
        "extra.empty": torch.zeros(0, 8),
        "extra.bytes": torch.arange(-60, 67, dtype=torch.int8),
        "extra.half": torch.randn(5, 7, 3).half(),
        "extra.large": torch.randn(600, 1000),
    }
    save_file(load_file(path / "model.safetensors") | extras, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads in groups of two; generation never meets an end-of-sequence token by chance."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": None, "max_position_embeddings": 512}
    return tiny_qwen3(tmp_path_factory.mktemp("untied"), **sizes)


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


def test_greedy_completions_are_those_of_transformers(model: Path) -> None:
    generator = make_generator(model)
    prompts = [[5, 9, 11], [7] * 9, [40, 41, 42, 43, 44]]
    reference = AutoModelForCausalLM.from_pretrained(model)
    for prompt, completion in zip(prompts, generator.generate(prompts, Sampling(12, temperature=0.0)), strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == 1 else "length")


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_sampled_logprobs_are_the_scores(untied: Path, tp: int, prefix_cache: bool) -> None:
    generator = make_generator(untied, tp=tp, prefix_cache=prefix_cache)
    prompts = [[5, 9, 11, 4, 8, 7, 33, 2, 9], [5, 9, 11, 4, 8, 7, 1], [7]]
    completions = generator.generate(prompts, Sampling(10, temperature=1.3, top_k=20, top_p=0.9, seed=3))
    sequences = pad_sequences(prompts, [c.token_ids for c in completions], temperature=1.3)
    scores_BT = generator.score(sequences)
    for row, completion in enumerate(completions):
        at = slice(len(prompts[row]), len(prompts[row]) + 10)
        np.testing.assert_allclose(scores_BT[row, at], completion.logprobs, atol=1e-5)


def test_a_seed_gives_the_same_tokens_however_many_run_at_once(untied: Path) -> None:
    prompts = [[n, n + 1] for n in range(3, 9)]
    sampling = Sampling(8, seed=11)
    all_at_once, two = (make_generator(untied, batch=batch).generate(prompts, sampling) for batch in (0, 2))
    assert [c.token_ids for c in all_at_once] == [c.token_ids for c in two]
    generator = make_generator(untied)
    first, second = (generator.generate(prompts, Sampling(8)) for _ in range(2))
    assert [c.token_ids for c in first] != [c.token_ids for c in second]


def test_top_k_of_one_and_a_small_top_p_are_greedy(untied: Path) -> None:
    generator = make_generator(untied)
    greedy, one, nucleus = (
        generator.generate([[5, 6, 7]], Sampling(8, temperature=t, top_k=k, top_p=p))[0].token_ids
        for t, k, p in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 1e-6))
    )
    assert greedy == one == nucleus


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_of_call_and_model_end_a_completion(untied: Path, tmp_path: Path, file: str) -> None:
    generator = make_generator(untied)
    whole = generator.generate([[5, 6]], Sampling(12, temperature=0.0))[0]
    stop = whole.token_ids[3]
    cut = generator.generate([[5, 6]], Sampling(12, temperature=0.0, stop_token_ids=(stop,)))[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    told = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(told | {"eos_token_id": [stop, 63]}))
    assert make_generator(tmp_path).generate([[5, 6]], Sampling(12, temperature=0.0)) == [cut]


def test_generator_refuses_what_it_cannot_do(untied: Path, tmp_path: Path) -> None:
    generator = make_generator(untied)
    with pytest.raises(ConfigError, match="stop_token_ids"):
        generator.generate([[5]], Sampling(4, stop=("x",)))
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generator.generate([[5], []], Sampling(4))
    with pytest.raises(DataError, match="token 64 is not in the vocabulary"):
        generator.generate([[5, 64]], Sampling(4))
    with pytest.raises(ConfigError, match="temperature 0"):
        generator.score(some_sequences(temperature=0.0))
    with pytest.raises(ModelError, match="cannot be cut into 3 ranks: vocab_size 64, num_attention_heads 4"):
        make_generator(untied, tp=3)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        make_generator(tmp_path)


def test_loader_names_the_tensor_that_it_refuses(untied: Path) -> None:
    generator = make_generator(untied)
    norm = "model.norm.weight"
    for name, shape in (("model.norm.bias", (32,)), (norm, (31,))):
        with pytest.raises(LayoutError) as error:
            generator.load(generator.ranks[0], [(name, torch.zeros(shape))])
        assert error.value.where["tensor"] == name


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shards", ["rows", "flat", "gathered"])
@pytest.mark.parametrize("tp", [1, 2])
def test_sync_brings_every_bit(model: Path, tmp_path: Path, shards: str, ranks: int, tp: int) -> None:
    with Stage(model, tmp_path, ranks, tp, shards=shards) as stage:
        for version in (1, 2):
            stage.train()
            report = stage.session.sync(version)
        assert report.wire == "reference over cma"
        assert report.bytes > 2**20
        assert_served(stage, tmp_path / "saved")
        assert stage.engine.generate([[5]], Sampling(2))[0].versions == [2, 2]


@pytest.mark.parametrize("shards", ["rows", "flat", "gathered"])
def test_sync_brings_what_is_transposed_and_rounded(model: Path, tmp_path: Path, shards: str) -> None:
    with Stage(model, tmp_path, 2, 2, {"dtype": "bfloat16"}, shards=shards, contiguous=False) as stage:
        assert not stage.trainers[0].tensors["extra.large"].is_contiguous()
        stage.train()
        stage.session.sync(1)
        assert_served(stage, tmp_path / "saved", torch.bfloat16)


def test_sync_brings_every_dtype_of_the_files(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 2, {"keep_dtypes": True}, shards="rows", keep_dtypes=True) as stage:
        stage.train()
        stage.session.sync(1)
        assert_served(stage, tmp_path / "saved")
        held = stage.generator.ranks[1].parameters
        assert (held["extra.half"].dtype, held["extra.bytes"].dtype) == (torch.float16, torch.int8)


def test_barrier_reads_the_replica_in_place(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 1, publish="barrier", shards="rows") as stage:
        for version in (1, 2):
            stage.train()
            stage.session.sync(version)
        assert_served(stage, tmp_path / "saved")
        for trainer, publisher in zip(stage.trainers, stage.publishers, strict=True):
            storages = {tensor.untyped_storage().data_ptr() for tensor in trainer.tensors.values()}
            assert {view.untyped_storage().data_ptr() for view in publisher._slots[0].segments} <= storages


def test_ranks_that_share_a_key_value_head_are_synced(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 4) as stage:
        stage.train()
        stage.session.sync(1)
        stage.trainers[0].save(tmp_path / "saved")
        for rank, loaded in zip(stage.generator.ranks, make_generator(tmp_path / "saved", tp=4).ranks, strict=True):
            assert all(torch.equal(tensor, loaded.parameters[name]) for name, tensor in rank.parameters.items())


def test_sync_names_a_tensor_that_the_engine_has_not(model: Path, untied: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 1, 1, served=untied) as stage, pytest.raises(LayoutError, match="no such tensor") as error:
        stage.session.sync(1)
    assert error.value.where["tensor"] == "extra.bytes"


def test_sync_refuses_a_head_of_its_own_where_the_engine_ties_it(untied: Path, tmp_path: Path) -> None:
    tied = tiny_qwen3(tmp_path / "tied", tied=True, vocab_size=VOCABULARY)
    with Stage(untied, tmp_path, 1, 1, served=tied) as stage, pytest.raises(LayoutError, match="written twice") as error:
        stage.session.sync(1)
    assert error.value.where["tensor"] in ("lm_head.weight", "model.embed_tokens.weight")


def test_barrier_refuses_transposed_storage(model: Path, tmp_path: Path) -> None:
    with (
        Stage(model, tmp_path, 1, 1, publish="barrier", contiguous=False) as stage,
        pytest.raises(LayoutError, match="not contiguous"),
    ):
        stage.session.sync(1)


def test_ranks_take_the_same_steps(untied: Path) -> None:
    trainers = [make_trainer(untied, rank=rank, ranks=2) for rank in range(2)]
    before = {name: tensor.clone() for name, tensor in trainers[0].tensors.items()}
    metrics = [trainer.train_step(some_batch().shard(trainer.context.rank, 2)) for trainer in trainers]
    for name, tensor in trainers[0].tensors.items():
        assert torch.equal(tensor, trainers[1].tensors[name])
        assert not torch.equal(tensor, before[name])
    change = torch.cat([(trainers[0].tensors[name] - before[name]).flatten() for name in before])
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert metrics[0]["loss"] > 1


def test_state_goes_on_exactly(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, contiguous=False)
    trainer.train_step(some_batch())
    trainer.save_state(tmp_path)
    trainer.train_step(some_batch())
    resumed = make_trainer(model)
    addresses = {name: tensor.data_ptr() for name, tensor in resumed.tensors.items()}
    resumed.load_state(tmp_path)
    resumed.train_step(some_batch())
    for name, tensor in trainer.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name])
        assert resumed.tensors[name].data_ptr() == addresses[name]


def test_state_of_another_model_is_refused(model: Path, untied: Path, tmp_path: Path) -> None:
    make_trainer(model).save_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"'extra.bytes' is int8\[127\] there, absent here"):
        make_trainer(untied).load_state(tmp_path)
    with pytest.raises(CheckpointError, match="rank 1 of 2"):
        make_trainer(model, rank=1, ranks=2).load_state(tmp_path)
    file = tmp_path / "rank-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(model).load_state(tmp_path)


def test_saved_model_is_one_that_transformers_loads(untied: Path, tmp_path: Path) -> None:
    trainer = make_trainer(untied, dtype="bfloat16")
    trainer.train_step(some_batch())
    trainer.save(tmp_path / "saved")
    make_trainer(untied, rank=1, ranks=2).save(tmp_path / "not")
    assert not (tmp_path / "not").exists()
    sequences = some_sequences(temperature=1.0)
    np.testing.assert_allclose(trainer.score(sequences), transformers_logprobs(tmp_path / "saved", sequences), atol=1e-4)
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {file.name for file in untied.iterdir()}


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


def test_gathering_without_a_rank_ends_at_its_deadline(model: Path, tmp_path: Path) -> None:
    trainers = make_trainers(model, tmp_path, 2, shards="gathered", timeout=0.5)
    with pytest.raises(DeadlineError, match=r"did not gather 'extra\.bytes' within 0\.5 s"):
        list(trainers[0].export())


def test_a_prefix_is_stale_until_caches_are_invalidated(untied: Path) -> None:
    generator = make_generator(untied)
    prompt = [[5, 9, 11, 4, 8, 7, 33, 2, 9]]
    sampling = Sampling(6, temperature=0.0)
    generator.generate(prompt, sampling)
    for rank in generator.ranks:
        for tensor in rank.parameters.values():
            tensor.mul_(1.5)
        generator.refresh(rank)
    stale = generator.generate(prompt, sampling)[0]
    generator.invalidate_caches()
    right = generator.generate(prompt, sampling)[0]
    sequences = pad_sequences(prompt, [right.token_ids])
    np.testing.assert_allclose(generator.score(sequences)[0, len(prompt[0]) :], right.logprobs, atol=1e-5)
    assert max(abs(a - b) for a, b in zip(stale.logprobs, right.logprobs, strict=True)) > 1e-2


def test_forward_uses_what_is_derived(untied: Path) -> None:
    generator = make_generator(untied)
    sequences = some_sequences(temperature=1.0)
    before_BT = generator.score(sequences)
    for rank in generator.ranks:
        rank.parameters["model.layers.0.self_attn.q_norm.weight"].mul_(3)
    np.testing.assert_array_equal(generator.score(sequences), before_BT)
    generator.refresh(generator.ranks[0])
    assert np.abs(generator.score(sequences) - before_BT).max() > 1e-2


def test_keep_holds_requests_and_they_go_on_with_new_weights(untied: Path) -> None:
    generator = make_generator(untied, token_seconds=0.002)
    with running(generator, [[5, 9, 11, 4, 8], [7, 7]]) as call:
        generator.pause("keep")
        held = [len(request.completion.token_ids) for request in generator.requests]
        time.sleep(0.05)
        assert held == [len(request.completion.token_ids) for request in generator.requests]
        for tensor in generator.ranks[0].parameters.values():
            tensor.mul_(1.2)
        generator.refresh(generator.ranks[0])
        generator.invalidate_caches()
        generator.version = 1
        generator.resume()
        completions = call()
    prompts = [[5, 9, 11, 4, 8], [7, 7]]
    scores_BT = generator.score(pad_sequences(prompts, [c.token_ids for c in completions]))
    for row, completion in enumerate(completions):
        first = completion.versions.index(1)
        assert completion.versions == [0] * first + [1] * (LONG - first)
        assert first == held[row]
        start = len(prompts[row]) + first
        np.testing.assert_allclose(scores_BT[row, start : len(prompts[row]) + LONG], completion.logprobs[first:], atol=1e-4)


def test_wait_lets_running_requests_end_and_others_wait(untied: Path) -> None:
    generator = make_generator(untied, batch=1, token_seconds=0.0005)
    with running(generator, [[5, 6], [7, 8]]) as call:
        generator.pause("wait")
        first, second = generator.requests
        assert (first.completion.finish_reason, len(first.completion.token_ids)) == ("length", LONG)
        time.sleep(0.02)
        assert (second.state, second.completion.token_ids) == ("waiting", [])
        generator.version = 1
        generator.resume()
        completions = call()
    assert [set(c.versions) for c in completions] == [{0}, {1}]


def test_abort_ends_requests_with_what_they_have(untied: Path) -> None:
    generator = make_generator(untied, batch=1, token_seconds=0.002)
    with running(generator, [[5, 6], [7, 8]]) as call:
        generator.pause("abort")
        completions = call()
    assert [c.finish_reason for c in completions] == ["abort", "abort"]
    assert 0 < len(completions[0].token_ids) < LONG
    assert completions[1].token_ids == []
    generator.resume()
    assert generator.generate([[5]], Sampling(3))[0].finish_reason == "length"


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_calls_in_a_pause_wait_for_its_end(untied: Path, mode: Any) -> None:
    generator = make_generator(untied, pause_seconds=0.1)
    generator.pause(mode)
    with pytest.raises(DeadlineError, match=f"paused \\({mode}\\), and no request could begin within 0.1 s"):
        generator.generate([[5]], Sampling(3))
    assert generator.requests == []
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generator.generate, [[5]], Sampling(3))
        time.sleep(0.02)
        generator.version = 4
        generator.resume()
        assert call.result(5)[0].versions == [4, 4, 4]


def test_pause_that_waits_too_long_says_so(untied: Path) -> None:
    generator = make_generator(untied, pause_seconds=0.1, token_seconds=0.01)
    with running(generator, [[5]]) as call:
        with pytest.raises(DeadlineError, match="running requests did not end"):
            generator.pause("wait")
        generator.pause("abort")
        call()


def test_transport_reads_in_buckets_within_its_deadline() -> None:
    source, sink, blocks = connected(bucket_bytes=700, delay_seconds=0.01)
    assert sink.receive(1, 0, {}, time.monotonic() + 5) == 3000
    assert torch.equal(blocks["sink"][:3000], blocks["source"][96:3096])
    assert (sink.evidence().wire, sink.evidence().bytes_moved) == ("cma", 3000)
    assert source.evidence().wire == ""
    blocks["sink"].zero_()
    with pytest.raises(DeadlineError, match=r"not read: trainer\[0\]"):
        sink.receive(2, 0, {}, time.monotonic() + 0.025)
    arrived = blocks["sink"].clone()
    assert 0 < int((arrived != 0).sum()) < 3000
    time.sleep(0.03)
    assert torch.equal(blocks["sink"], arrived)
    assert sink.settled(peers_closed=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"source_block": 1}, "leaves the source's blocks"),
        ({"source_offset": 1097}, "leaves the source's blocks"),
        ({"sink_offset": 1001}, "leaves the sink's blocks"),
        ({"sink_offset": -1}, "leaves the sink's blocks"),
        ({"source": "trainer[7]"}, "without an address"),
    ],
)
def test_transport_refuses_copies_that_leave_the_blocks(change: dict[str, Any], what: str) -> None:
    with pytest.raises(TransportError, match=what):
        connected(change)


def test_transport_reads_another_process_also_while_it_is_stopped() -> None:
    child = ProcessParty("trainer[0]", _Source)
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    arrived = torch.zeros(5000, dtype=torch.uint8)
    sink.open([arrived])
    sink.connect({"trainer[0]": child.do("open")}, [Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 0, 0, 0, 5000)])
    child.signal(signal.SIGSTOP)
    assert sink.receive(1, 0, {}, time.monotonic() + 5) == 5000
    assert (arrived == 9).all()
    child.stop()
    with pytest.raises(PeerLostError):
        sink.receive(2, 0, {}, time.monotonic() + 5)


class _Source:
    """The source's end, in a process of its own."""

    def open(self) -> bytes:
        self._end = ReferenceTransport(TransportContext("trainer[0]", "source", 1, "cpu", {}), ReferenceTransportOptions())
        return self._end.open([torch.full((5000,), 9, dtype=torch.uint8)])


def test_transport_names_a_peer_that_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    here = wire.Address(wire._here(), child.pid, wire._started(child.pid) or 0, [wire.Block(4096, 10)])
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    sink.open([torch.zeros(10, dtype=torch.uint8)])
    copy = Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 0, 0, 0, 10)
    sink.connect({"trainer[0]": packed(here)}, [copy])
    with pytest.raises(TransportError, match="begin a new one"):
        sink.receive(1, 0, {}, time.monotonic() + 5)  # nothing is mapped at 4096
    child.kill()
    time.sleep(0.02)
    with pytest.raises(PeerLostError) as error:  # a zombie: it has a pid and a start, and no memory
        sink.receive(1, 0, {}, time.monotonic() + 5)
    assert error.value.where["peer"] == "trainer[0]"
    child.wait()
    with pytest.raises(PeerLostError):
        sink.receive(1, 0, {}, time.monotonic() + 5)


@pytest.mark.parametrize(("change", "kind"), [({"started": 1}, PeerLostError), ({"where": "elsewhere"}, TransportError)])
def test_transport_refuses_another_process_of_the_same_pid(change: dict[str, Any], kind: type[RlbridgeError]) -> None:
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    address = msgspec.structs.replace(msgspec.msgpack.decode(sink.open([]), type=wire.Address), **change)
    with pytest.raises(kind) as error:
        sink.connect({"trainer[0]": packed(address)}, [])
    assert error.value.where["peer"] == "trainer[0]"


def test_transport_loops_over_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wire._readv
    monkeypatch.setattr(wire, "_readv", lambda pid, remote, local, nbytes: whole(pid, remote, local, min(nbytes, 64)))
    _, sink, blocks = connected()
    sink.receive(1, 0, {}, time.monotonic() + 5)
    assert torch.equal(blocks["sink"][:3000], blocks["source"][96:3096])


def test_transport_says_what_a_refused_read_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(wire, "_readv", refuse)
    _, sink, _ = connected()
    with pytest.raises(TransportError, match="ptrace_scope"):
        sink.receive(1, 0, {}, time.monotonic() + 5)
    assert "forbidden here" in (ReferenceTransport.unavailable(ReferenceTransportOptions(), "cpu") or "")


def test_transport_is_unavailable_where_the_call_is(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ReferenceTransportOptions()
    assert ReferenceTransport.unavailable(options, "cpu") is None
    assert "cuda" in (ReferenceTransport.unavailable(options, "cuda") or "")
    monkeypatch.setattr(wire, "_process_vm_readv", None)
    assert "Linux" in (ReferenceTransport.unavailable(options, "cpu") or "")


class InProcess:
    """A party of the session that is an object here."""

    actor = None

    def __init__(self, name: str, handle: Callable[[str, bytes], Any]) -> None:
        self.name = name
        self._handle = handle
        self._pool = ThreadPoolExecutor(2)

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        def run() -> list[bytes]:
            reply = self._handle(method, payload)
            return [reply] if isinstance(reply, bytes) else reply

        return self._pool.submit(run)

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        raise TypeError("no Ray here")

    def close(self) -> None:
        self._pool.shutdown()


class Stage:
    """Trainer ranks and one engine in this process, with a session between them."""

    def __init__(
        self,
        model: Path,
        directory: Path,
        ranks: int,
        tp: int,
        generator: dict[str, Any] | None = None,
        publish: Any = "snapshot",
        served: Path | None = None,
        **options: Any,
    ) -> None:
        self.trainers = make_trainers(model, directory, ranks, **options)
        self.generator = make_generator(served or model, tp=tp, **(generator or {}))
        self.engine = Engine("generator[0]", self.generator)
        self.publishers = [Publisher(f"trainer[{rank}]", trainer.weights()) for rank, trainer in enumerate(self.trainers)]
        self.parties = [InProcess(publisher.name, publisher.handle) for publisher in self.publishers]
        self.parties.append(InProcess("generator[0]", self.engine.handle))
        self.session = SyncSession(
            self.parties[:-1], self.parties[-1:], TransportSpec("reference", {}), SyncOptions(publish, deadline_seconds=10.0)
        )

    def train(self) -> None:
        for trainer in self.trainers:
            trainer.train_step(some_batch())

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        for party in self.parties:
            party.close()
        for trainer in self.trainers:
            trainer.close()


def assert_served(stage: Stage, saved: Path, dtype: torch.dtype | None = None) -> None:
    """The engine holds what `save` writes, bit for bit, wherever it keeps it; and so does its scoring."""
    stage.trainers[0].save(saved)
    expected = load_file(saved / "model.safetensors")
    found = reassembled(stage.generator)
    assert found.keys() - expected.keys() == {"lm_head.weight"}
    for name, tensor in expected.items():
        rounded = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(found[name], rounded), name
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    if dtype is None:
        sequences = some_sequences(temperature=1.0)
        np.testing.assert_allclose(stage.generator.score(sequences), stage.trainers[0].score(sequences), atol=1e-4)


def reassembled(generator: ReferenceGenerator) -> dict[str, torch.Tensor]:
    """The checkpoint tensors, put together again out of the ranks' parameters by hand: 4 query and 2 key-value heads of 8."""
    parts = [rank.parameters for rank in generator.ranks]
    tp = len(parts)
    found: dict[str, torch.Tensor] = {}
    for name in parts[0]:
        if "qkv_proj" in name:
            cuts = [torch.split(part[name], [32 // tp, 16 // tp, 16 // tp]) for part in parts]
            found |= {name.replace("qkv", kind): torch.cat([cut[i] for cut in cuts]) for i, kind in enumerate("qkv")}
        elif "gate_up_proj" in name:
            found[name.replace("gate_up", "gate")] = torch.cat([part[name][: 48 // tp] for part in parts])
            found[name.replace("gate_up", "up")] = torch.cat([part[name][48 // tp :] for part in parts])
        elif "o_proj" in name or "down_proj" in name:
            found[name] = torch.cat([part[name] for part in parts], dim=1)
        elif "embed_tokens" in name or "lm_head" in name:
            found[name] = torch.cat([part[name] for part in parts])
        else:
            assert all(torch.equal(part[name], parts[0][name]) for part in parts)
            found[name] = parts[0][name]
    return found


class running:  # noqa: N801  (used as a function)
    """A call of `generate` on a thread of its own, some tokens on its way; gives what waits for its completions."""

    def __init__(self, generator: ReferenceGenerator, prompts: list[list[int]]) -> None:
        self._generator, self._prompts = generator, prompts
        self._found: list[Completion] = []

    def __enter__(self) -> Callable[[], list[Completion]]:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        limit = time.monotonic() + 10
        while not (requests := self._generator.requests) or len(requests[0].completion.token_ids) < 3:
            assert time.monotonic() < limit
            time.sleep(0.001)
        return self._result

    def __exit__(self, *_: object) -> None:
        self._generator.pause("abort")
        self._thread.join(10)
        self._generator.resume()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._found = self._generator.generate(self._prompts, Sampling(LONG, seed=1))

    def _result(self) -> list[Completion]:
        self._thread.join(20)
        assert self._found
        return self._found


def make_trainers(model: Path, directory: Path, ranks: int, **options: Any) -> list[ReferenceTrainer]:
    """All ranks at once, since they may have to meet."""
    with ThreadPoolExecutor(ranks) as pool:
        url = f"file://{directory}/meeting"
        return list(pool.map(lambda rank: make_trainer(model, rank=rank, ranks=ranks, url=url, **options), range(ranks)))


def make_trainer(
    model: Path, *, rank: int = 0, ranks: int = 1, url: str = "", timeout: float = 10.0, **options: Any
) -> ReferenceTrainer:
    chosen = ReferenceTrainerOptions(**options)
    context = TrainerContext(
        rank=rank,
        world_size=ranks,
        device="cpu",
        model_path=str(model),
        seed=7,
        rendezvous=url,
        timeout_seconds=timeout,
        trust_remote_code=False,
        algorithm=AlgorithmOptions(0.2, 0.2, 0.0),
        optimizer=OptimizerOptions(1e-2, (0.9, 0.95), 1e-8, 0.0, 1.0, 0),
        options=chosen.model_dump(),
    )
    trainer = ReferenceTrainer()
    trainer.setup(context, chosen)
    return trainer


def make_generator(model: Path, **options: Any) -> ReferenceGenerator:
    chosen = ReferenceGeneratorOptions(**options)
    generator = ReferenceGenerator()
    generator.setup(GeneratorContext(0, 1, "cpu", str(model), 7, False, chosen.model_dump()), chosen)
    return generator


def some_sequences(*, temperature: float) -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (1, 7, 4, 9)]
    completions = [rng.integers(0, VOCABULARY, length).tolist() for length in (5, 1, 8, 3)]
    return pad_sequences(prompts, completions, temperature=temperature)


def some_batch() -> Batch:
    sequences = some_sequences(temperature=1.0)
    mask_BT = sequences.completion_mask_BT()
    zeros_BT = np.zeros(mask_BT.shape, dtype=np.float32)
    return Batch(sequences, zeros_BT, np.ones(len(mask_BT), np.float32), zeros_BT.astype(np.int32), int(mask_BT.sum()), 1)


def transformers_logprobs(path: Path, sequences: Sequences) -> np.ndarray[Any, Any]:
    tokens_BT = torch.from_numpy(sequences.tokens_BT.astype(np.int64))
    with torch.no_grad():
        logits_BTV = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens_BT).logits
    logprobs_BTV = (logits_BTV[:, :-1] / sequences.temperature).log_softmax(-1)
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    found_BT[:, 1:] = logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0].numpy()
    return np.where(sequences.completion_mask_BT(), found_BT, 0)


def connected(
    change: dict[str, Any] | None = None, **options: Any
) -> tuple[ReferenceTransport, ReferenceTransport, dict[str, torch.Tensor]]:
    """A source and a sink in this process, with one copy of 3000 bytes; and their blocks."""
    chosen = ReferenceTransportOptions(**options)
    source = ReferenceTransport(TransportContext("trainer[0]", "source", 1, "cpu", {}), chosen)
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), chosen)
    blocks = {"source": torch.randint(1, 256, (4096,), dtype=torch.uint8), "sink": torch.zeros(4000, dtype=torch.uint8)}
    address = source.open([blocks["source"]])
    sink.open([blocks["sink"]])
    copy = msgspec.structs.replace(Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 96, 0, 0, 3000), **(change or {}))
    sink.connect({"trainer[0]": address}, [copy, msgspec.structs.replace(copy, slot=1)])
    return source, sink, blocks


def packed(address: wire.Address) -> bytes:
    return msgspec.msgpack.encode(address)
