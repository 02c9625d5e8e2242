"""What of the SGLang plugin needs no SGLang: its options, its messages, its sockets and its stand-ins."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from rlbridge.errors import DataError, DeadlineError, LayoutError, PeerLostError, SyncError
from rlbridge.plugins import registry
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.sync.messages import Described, Record, Wait, answer, pack, result
from rlbridge.weights.layout import Layout, Region, TensorMeta
from rlbridge.weights.model_files import Checkpoint
from rlbridge_sglang.channel import Handle, RankClient, RankServer
from rlbridge_sglang.cpu_environment import SGLANG_CPU
from rlbridge_sglang.engine_loop import EngineLoop
from rlbridge_sglang.hosted import HostedEngine
from rlbridge_sglang.launch import engine_arguments
from rlbridge_sglang.model_sink import ModelSink
from rlbridge_sglang.options import RESERVED, SglangGeneratorOptions
from rlbridge_sglang.ranks import Ranks
from rlbridge_sglang.requests import check_prompts, completion, sampling_params, scores
from rlbridge_sglang.taken import check_taken, checked

Serve = Callable[[Handle], tuple[RankServer, RankClient]]

_SITE = Path(__file__).parents[2] / "plugins" / "rlbridge_sglang" / "cpu_site"


def test_the_plugin_is_listed_without_sglang() -> None:
    backend = registry().backend("generator", "sglang")
    assert backend.environments == (SGLANG_CPU.name,)
    assert registry().options_model("generator", "sglang") is SglangGeneratorOptions
    code = "import rlbridge_sglang, sys; assert not {'torch', 'sglang', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("key", sorted(RESERVED))
def test_an_argument_that_rlbridge_sets_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} cannot be set here: "):
        SglangGeneratorOptions(backend="sglang", engine_args={key: 1})


def test_a_cpu_differs_in_kernels_and_sizes_alone() -> None:
    options = SglangGeneratorOptions(backend="sglang", tensor_parallel=2, engine_args={"page_size": 16})
    cpu, cuda = (engine_arguments(_context(device), options) for device in ("cpu", "cuda"))
    differing = {key for key in cpu.keys() | cuda.keys() if cpu.get(key) != cuda.get(key)}
    assert differing == {
        *("device", "attention_backend", "disable_cuda_graph", "disable_overlap_schedule", "sleep_on_idle"),
        *("max_total_tokens", "max_running_requests"),
    }
    assert (cuda["tp_size"], cuda["page_size"], cuda["device"]) == (2, 16, "cuda")


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    resources = {"gpus": 1}
    with pytest.raises(ValidationError, match=r"tensor_parallel=2 needs as many GPUs, and resources\.gpus is 1"):
        SglangGeneratorOptions(backend="sglang", tensor_parallel=2, resources=resources)
    SglangGeneratorOptions(backend="sglang", tensor_parallel=1, resources=resources)
    SglangGeneratorOptions(backend="sglang", tensor_parallel=2)


@pytest.mark.parametrize(
    ("config", "device", "engine_args", "runner"),
    [
        ({"num_experts": 8}, "cuda", {}, "triton"),
        ({"text_config": {"num_local_experts": 8}}, "cuda", {}, "triton"),
        ({"num_experts": 8}, "cpu", {}, None),
        ({"num_experts": 8}, "cuda", {"moe_runner_backend": "auto"}, "auto"),
        ({"num_experts": 8}, "cuda", {"moe_a2a_backend": "deepep"}, None),
        ({"num_experts": 8}, "cuda", {"quantization": "fp8"}, None),
        ({"num_experts": 8, "quantization_config": {"quant_method": "fp8"}}, "cuda", {}, None),
        ({"hidden_size": 8, "num_experts": None}, "cuda", {}, None),
        (None, "cuda", {}, None),
    ],
)
def test_experts_are_served_as_they_are_loaded(
    tmp_path: Path, config: dict[str, Any] | None, device: str, engine_args: dict[str, Any], runner: str | None
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    options = SglangGeneratorOptions(backend="sglang", engine_args=engine_args)
    assert engine_arguments(_context(device, str(tmp_path)), options).get("moe_runner_backend") == runner


def test_options_come_before_what_a_cpu_is_given() -> None:
    options = SglangGeneratorOptions(backend="sglang", cache_tokens=99, attention_backend="intel_amx")
    arguments = engine_arguments(_context("cpu"), options)
    assert (arguments["max_total_tokens"], arguments["attention_backend"]) == (99, "intel_amx")


def test_each_prompt_of_a_call_has_a_seed_of_its_own() -> None:
    first, again = (sampling_params(Sampling(4, seed=1), 3, 1) for _ in range(2))
    assert first == again
    assert len({params["sampling_seed"] for params in first}) == 3
    assert first[0]["sampling_seed"] != sampling_params(Sampling(4), 3, 2)[0]["sampling_seed"]


def test_no_cut_and_no_stop_are_said_as_sglang_says_them() -> None:
    (params,) = sampling_params(Sampling(4, top_k=0), 1, 0)
    assert (params["top_k"], params["stop"], params["stop_token_ids"]) == (-1, None, None)
    (params,) = sampling_params(Sampling(4, top_k=3, stop=("a",), stop_token_ids=(7,)), 1, 0)
    assert (params["top_k"], params["stop"], params["stop_token_ids"]) == (3, ["a"], [7])


def test_a_completion_carries_the_version_of_each_token() -> None:
    meta = {
        "finish_reason": {"type": "length", "length": 3},
        "output_token_logprobs": [(-0.5, 4, None), (-1.0, 5, None), (-1.5, 6, None)],
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
    }
    said = completion({"output_ids": [4, 5, 6], "meta_info": meta}, 9)
    assert said == Completion([4, 5, 6], [-0.5, -1.0, -1.5], [3, 3, 4], "length")
    del meta["weight_versions"]
    assert completion({"output_ids": [4, 5, 6], "meta_info": meta}, 9).versions == [9, 9, 9]


def test_a_request_that_was_aborted_before_it_ran_is_an_empty_completion() -> None:
    output = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "output_token_logprobs": []}}
    assert completion(output, 1) == Completion([], [], [], "abort")


def test_scores_are_of_completions_alone() -> None:
    sequences = pad_sequences([[5, 6], [7]], [[8], [9, 10]])
    told = [{"meta_info": {"input_token_logprobs": [(None, 5), (-1.0, 6), (-2.0, 8)]}},
            {"meta_info": {"input_token_logprobs": [(None, 7), (-3.0, 9), (-4.0, 10)]}}]  # fmt: skip
    found = scores(sequences, told)
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 0, -2], [0, -3, -4]]


@pytest.mark.parametrize("prompts", [[[]], [[1], [7]], [[-1]]])
def test_a_prompt_that_sglang_would_choke_on_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(DataError, match=f"prompt {len(prompts) - 1} "):
        check_prompts(prompts, 7)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Makes a rank that answers with a function, and what calls it."""
    servers: list[RankServer] = []

    def serve(handle: Handle) -> tuple[RankServer, RankClient]:
        path = tmp_path / f"rank{len(servers)}.sock"
        servers.append(RankServer(path, handle))
        return servers[-1], RankClient(f"generator[0].rank[{len(servers) - 1}]", path)

    yield serve
    for server in servers:
        server.close()


def test_calls_of_a_rank_are_answered_side_by_side(serve: Serve) -> None:
    go = threading.Event()

    def handle(method: str, payload: bytes) -> bytes:
        if method == "slow":
            go.wait(10)
        return method.encode() + payload

    ranks = Ranks([serve(handle)[1]], lambda ticket: None, 5.0)
    slow: list[list[bytes]] = []
    thread = threading.Thread(target=lambda: slow.append(ranks.call("slow", b"1")))
    thread.start()
    assert ranks.call("fast", b"x" * 3_000_000) == [b"fast" + b"x" * 3_000_000]
    assert slow == []
    go.set()
    thread.join(10)
    assert slow == [[b"slow1"]]


def test_what_writes_weights_runs_on_the_schedulers_thread_in_every_rank(serve: Serve) -> None:
    ran: list[str] = []

    def handle(method: str, payload: bytes) -> bytes:
        ran.append(threading.current_thread().name)
        return payload

    served = [serve(handle) for _ in range(2)]

    def scheduler(ticket: int) -> None:
        thread = threading.Thread(target=lambda: [server.run(ticket) for server, _ in served], name="scheduler")
        thread.start()
        thread.join()

    ranks = Ranks([client for _, client in served], scheduler, 5.0)
    assert ranks.call_between_passes("install", b"p") == [b"p", b"p"]
    assert ran == ["scheduler", "scheduler"]


def test_a_call_that_sglang_does_not_run_is_an_error(serve: Serve) -> None:
    server, client = serve(lambda method, payload: b"")

    def refuse(ticket: int) -> None:
        raise AssertionError("no such method")

    with pytest.raises(SyncError, match="did not run 'install': no such method"):
        Ranks([client], refuse, 0.5).call_between_passes("install", b"")
    with pytest.raises(SyncError, match="no call 7 is announced"):
        server.run(7)


def test_a_rank_that_is_gone_is_named(tmp_path: Path) -> None:
    client = RankClient("generator[0].rank[1]", tmp_path / "nobody", lambda: "pid 7 ended with -9")
    with pytest.raises(PeerLostError, match=r"the process of generator\[0\]\.rank\[1\] is gone: pid 7 ended with -9"):
        Ranks([client], lambda ticket: None, 1.0).call("state", b"")


def test_a_rank_that_does_not_answer_is_named(serve: Serve) -> None:
    _, client = serve(lambda method, payload: time.sleep(1) or b"")
    with pytest.raises(DeadlineError, match=r"generator\[0\]\.rank\[0\] did not answer 'check' within 0\.2 s"):
        Ranks([client], lambda ticket: None, 0.2).call("check", b"")


def test_waiting_for_bytes_has_the_time_that_it_asks_for(serve: Serve) -> None:
    _, client = serve(lambda method, payload: time.sleep(0.5) or b"done")
    payload = msgspec.msgpack.encode([pack(Wait(1, 5.0))])
    assert Ranks([client], lambda ticket: None, 0.2).call("wait_pull", payload) == [b"done"]


def test_calls_of_an_engine_end_when_a_process_of_it_is_lost() -> None:
    lost: list[PeerLostError] = []
    loop = EngineLoop("generator[0]", lambda: lost[0] if lost else None)
    assert loop.start(lambda: "engine", 5.0) == "engine"
    assert loop.call(_slow(0.0, 3), 5.0, "generate") == 3
    with pytest.raises(DeadlineError, match=r"did not end 'generate' within 0\.1 s"):
        loop.call(_slow(30.0), 0.1, "generate")
    threading.Timer(0.2, lambda: lost.append(PeerLostError("gone"))).start()
    with pytest.raises(PeerLostError, match="gone"):
        loop.call(_slow(30.0), 20.0, "generate")
    with pytest.raises(PeerLostError, match="gone"):
        loop.run(lambda: None, 5.0, "rpc")
    loop.stop()


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def build() -> Any:
        raise ValueError("no such model")

    loop = EngineLoop("generator[0]", lambda: None)
    with pytest.raises(ValueError, match="no such model"):
        loop.start(build, 5.0)
    loop.stop()


@pytest.mark.parametrize("recorded", [True, False])
def test_padding_stays_when_parameters_are_scrambled(recorded: bool) -> None:
    """A sync does not write it."""
    model = torch.nn.Embedding(8, 2).requires_grad_(False)
    model.weight[5:].zero_()

    def load_weights(weights: Any) -> None:
        for _, tensor in weights:
            model.weight.data[5:].fill_(0)
            model.weight.data[:5].copy_(tensor)

    model.__dict__["load_weights"] = load_weights
    sink = ModelSink(model)
    if recorded:
        sink.record([TensorMeta("embed", (5, 2), "float32")])
    sink.scramble()
    assert model.weight[:5].unique().tolist() == [7]
    assert model.weight[5:].unique().tolist() == [0]


def test_a_parameter_that_the_loader_reshapes_is_refused_and_put_back() -> None:
    model = torch.nn.Embedding(4, 6)
    before = model.weight.data.clone()
    pointer = model.weight.data_ptr()

    def load_weights(weights: Any) -> None:
        model.weight.data = model.weight.data.reshape(8, 3)
        for _, tensor in weights:
            model.weight.data.copy_(tensor)

    model.__dict__["load_weights"] = load_weights
    sink = ModelSink(model)
    with pytest.raises(
        LayoutError, match=r"'weight' in another form .* shape \(4, 6\) .* shape \(8, 3\)(.|\n)*moe_runner_backend: triton"
    ):
        sink.record([TensorMeta("embed", (8, 3), "float32")])
    assert (model.weight.shape, model.weight.data_ptr()) == (before.shape, pointer)
    assert torch.equal(model.weight, before)


def test_a_parameter_that_is_moved_after_an_update_is_not_taken_for_what_is_served() -> None:
    model = torch.nn.Embedding(4, 6)
    model.__dict__["load_weights"] = lambda weights: [model.weight.data.copy_(tensor) for _, tensor in weights]
    sink = ModelSink(model)
    (region,) = sink.record([TensorMeta("embed", (4, 6), "float32")]).regions
    sink.bind([(0, region)])
    sink.install([torch.ones(4, 6)])
    assert sink.live()[0].unique().tolist() == [1]
    model.weight = torch.nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(LayoutError, match="'weight' in another form"):
        sink.live()


@pytest.mark.parametrize("attribute", ["use_flashinfer_trtllm_moe", "w13_swiglu_interleaved"])
def test_experts_whose_rows_sglang_has_moved_are_refused_before_the_loader_runs(attribute: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.__dict__["load_weights"] = lambda weights: pytest.fail("the loader was run")
    sink = ModelSink(model)
    model[0].quant_method = SimpleNamespace(**{attribute: True})
    with pytest.raises(LayoutError, match=rf"weights of '0' in another form than its loader writes \({attribute}\)"):
        sink.record([])


def test_a_model_that_sglang_would_not_update_is_refused_in_its_words() -> None:
    model = torch.nn.Linear(2, 2)
    model.__dict__["load_weights"] = lambda weights: pytest.fail("the loader was run")
    with pytest.raises(LayoutError, match="cannot update the weights of this model: splits are cached"):
        ModelSink(model, lambda: "splits are cached").record([])


def test_a_tensor_that_would_be_taken_into_the_padding_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 8, bias=False)

    def load(weights: Any) -> None:
        for _, weight in weights:
            model.weight.data[: len(weight)].copy_(weight)
            model.weight.data[len(weight) :].fill_(0)

    model.__dict__["load_weights"] = load
    save_file({"w": torch.zeros(5, 2)}, tmp_path / "model.safetensors")
    sink = ModelSink(model, checkpoint=Checkpoint(tmp_path))
    assert sink.record([TensorMeta("w", (5, 2), "float32")]).regions
    with pytest.raises(LayoutError, match=r"shape \(6, 2\), and the engine's model has \(5, 2\)"):
        sink.record([TensorMeta("w", (6, 2), "float32")])


def test_what_all_ranks_together_leave_out_is_refused() -> None:
    """Of a padded vocabulary of 5 rows, 2 ranks take 4 and 1; a norm is taken by both."""
    published = [
        TensorMeta("embed", (5, 2), "float32"),
        TensorMeta("norm", (3,), "float32"),
        TensorMeta("head", (5, 2), "float32", "embed"),
    ]
    norm = Region("norm", (0,), (3,))
    first, last = Region("embed", (0, 0), (4, 2)), Region("embed", (4, 0), (1, 2))
    ranks = [Layout(published, [first, norm]), Layout(published, [last, norm])]
    check_taken(published, ranks)
    with pytest.raises(LayoutError, match="drops this tensor"):
        check_taken([*published, TensorMeta("other", (3,), "float32")], ranks)
    with pytest.raises(LayoutError, match="takes 10 of the 12 elements"):
        check_taken([TensorMeta("embed", (6, 2), "float32"), *published[1:]], ranks)


def test_a_refusal_of_a_layout_is_every_ranks_answer() -> None:
    metas = [TensorMeta("norm", (3,), "float32")]
    reply = answer(lambda: Described("generator[0].rank[0]", Layout(metas, [Region("norm", (0,), (3,))])))
    payload = msgspec.msgpack.encode([pack(Record(metas))])
    assert checked(payload, [reply, reply]) == [reply, reply]
    more = msgspec.msgpack.encode([pack(Record([*metas, TensorMeta("other", (1,), "float32")]))])
    for refused in checked(more, [reply, reply]):
        with pytest.raises(LayoutError, match="drops this tensor"):
            result(refused, Described)
    failed = answer(lambda: _fail())
    assert checked(more, [failed, reply]) == [failed, reply]


def test_the_stand_in_hashes_as_sglang_does() -> None:
    murmur = _module("murmur_hash", _SITE / "sgl_kernel" / "murmur_hash.py")
    seeds, positions, columns = [0, 1, 12345678901234, 2**63 - 1], [0, 7, 4095, 3], [0, 1, 2, 151935]
    found = murmur.murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns))
    assert found.dtype == torch.uint32
    wanted = [[_murmur3(seed, position, column) for column in columns] for seed, position in zip(seeds, positions, strict=True)]
    assert found.to(torch.int64).tolist() == wanted


def test_a_kernel_that_is_missing_is_named_when_it_is_called() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(_SITE)!r})\n"
        "from sgl_kernel import copy_all_layer_kv_cache_cpu as kernel\n"
        "try: kernel(1, x=2)\n"
        "except NotImplementedError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "sgl_kernel.copy_all_layer_kv_cache_cpu" in done.stdout


def test_the_schemas_are_declared_when_torchvision_is_looked_for_and_not_before() -> None:
    code = (
        f"import site, sys; site.addsitedir({str(_SITE)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib.util; importlib.util.find_spec('torchvision')\n"
        "import torch; torch.ops.torchvision.nms\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class _Busy:
    """The control of an SGLang server whose requests do not end."""

    def __init__(self, *, is_closed: bool) -> None:
        self.calls: list[str] = []
        self.is_closed = is_closed

    def __getattr__(self, name: str) -> Callable[[], bool]:
        def call() -> bool:
            self.calls.append(name)
            return name == "is_running"

        return call


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_a_server_whose_requests_do_not_end_goes_on_unless_it_was_paused_before(mode: str, closed: bool) -> None:
    server, control = HostedEngine(None, ""), _Busy(is_closed=closed)
    with pytest.raises(SyncError, match="nobody has opened this server"):
        server.pause(mode)
    server._opened = SimpleNamespace(control=control, seconds=0.05)
    with pytest.raises(DeadlineError, match=rf"requests still ran 0\.05 s after the pause \({mode}\) had begun"):
        server.pause(mode)
    assert control.calls[0] == "close_door"
    assert ("let_go" in control.calls) == (not closed)
    assert "hold" not in control.calls
    assert ("abort" in control.calls) == (mode == "abort")


def _context(device: str, path: str = "/models/m") -> GeneratorContext:
    return GeneratorContext(0, 1, device, path, 0, False, {})


def _slow(seconds: float, value: object = None) -> Callable[[], Any]:
    import asyncio

    return lambda: asyncio.sleep(seconds, value)


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fail() -> None:
    raise LayoutError("the loader failed")


def _murmur3(seed: int, position: int, column: int) -> int:
    """MurmurHash3_x86_32 of 16 bytes, as its author wrote it."""
    low, state = 0xFFFFFFFF, 0
    for word in (seed & low, seed >> 32, position, column):
        word = word * 0xCC9E2D51 & low
        word = (word << 15 | word >> 17) & low
        state ^= word * 0x1B873593 & low
        state = (state << 13 | state >> 19) & low
        state = state * 5 + 0xE6546B64 & low
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B & low
    state = (state ^ state >> 13) * 0xC2B2AE35 & low
    return state ^ state >> 16
