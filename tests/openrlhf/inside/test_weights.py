"""What the OpenRLHF trainer publishes, saves and goes on from, on real ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlbridge.errors import CheckpointError
from rlbridge_openrlhf.loading import make_actor
from rlbridge_openrlhf.partitions import export
from rlbridge_openrlhf.trainer import OpenRLHFTrainer
from tests.models import tiny_llama, tiny_mixtral, tiny_qwen3, tiny_qwen3_moe
from tests.native.ranks import make_batch, on_ranks
from tests.native.training import assert_published_whole, publish

STAGES = pytest.mark.parametrize("stage", [2, 3])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), tied=True)


@contextmanager
def _no_gathers() -> Iterator[None]:
    """While it is open a collective of torch is an error, and so is gathering a parameter."""
    import deepspeed

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective was called to publish shards")

    patch = pytest.MonkeyPatch()
    for name in ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "barrier"):
        patch.setattr(dist, name, refuse, raising=False)
    patch.setattr(deepspeed.zero.GatheredParameters, "__enter__", refuse)
    try:
        yield
    finally:
        patch.undo()


def _forbid_gathers(trainer: OpenRLHFTrainer) -> None:
    """Let rank 0 publish before the others do: in whatever collective, it would wait for them in vain."""
    kind = type(trainer.weights())
    snapshot = kind.snapshot

    def without_gathers(self: Any, destinations: Any) -> None:
        with _no_gathers():
            if dist.get_rank() == 0:
                snapshot(self, destinations)
        dist.barrier()
        if dist.get_rank() > 0:
            snapshot(self, destinations)

    kind.snapshot = without_gathers  # type: ignore[method-assign]


MODELS = [
    (partial(tiny_qwen3, tied=True), 2, "bfloat16"),
    (tiny_llama, 1, "float32"),
    (tiny_qwen3, 3, "float32"),
    (tiny_qwen3_moe, 2, "float32"),
    (tiny_mixtral, 2, "bfloat16"),
]


@STAGES
@pytest.mark.parametrize(("make", "ranks", "dtype"), MODELS)
@pytest.mark.parametrize("weights", ["sharded", "gathered"])
def test_the_ranks_publish_each_saved_element_once(
    make: Any, ranks: int, dtype: str, weights: str, stage: int, tmp_path: Path
) -> None:
    results = on_ranks(
        ranks,
        publish,
        make(tmp_path / "model"),
        tmp_path,
        backend="openrlhf",
        options={"dtype": dtype, "weights": weights, "zero_stage": stage},
        arguments={"path": tmp_path / "saved", "before": _forbid_gathers if weights == "sharded" else None},
    )
    assert {kind for kind, _, _ in results} == {"ShardedSource" if weights == "sharded" else "GatheredSource"}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in saved.values())
    assert_published_whole(results, saved)
    assert all(layout.regions for _, layout, _ in results)


def load_again(trainer: OpenRLHFTrainer, model: Path, times: int) -> list[tuple[int, list[str]]]:
    """Loads whose tensors are not those of the files."""
    files = load_file(model / "model.safetensors")
    wrong = []
    for turn in range(times):
        actor, _ = make_actor(trainer._context, trainer._options, trainer._strategy.get_ds_eval_config())
        names = [name for name, tensor in export(actor.model) if not torch.equal(tensor, files[name])]
        wrong += [(turn, names)] if names else []
    return wrong


def test_what_is_loaded_is_what_the_files_hold_every_time(tmp_path: Path) -> None:
    """DeepSpeed went on before all parameters of a module had been gathered: about one load of ten was wrong, silently."""
    model = tiny_qwen3_moe(tmp_path / "model")
    arguments = {"model": model, "times": 25}
    wrong = on_ranks(2, load_again, model, tmp_path, backend="openrlhf", options={"zero_stage": 3}, arguments=arguments)
    assert wrong == [[], []]


def test_a_gather_is_seen_where_there_is_one(qwen3: Path, tmp_path: Path) -> None:
    """The control of the test above: gathered tensors are gathered."""
    arguments = {"path": tmp_path / "saved", "before": _forbid_gathers}
    options = {"weights": "gathered", "zero_stage": 3}
    with pytest.raises(AssertionError, match="a collective was called to publish shards"):
        on_ranks(1, publish, qwen3, tmp_path, backend="openrlhf", options=options, arguments=arguments)


@STAGES
def test_no_rank_copies_more_than_its_share(qwen3: Path, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage}
    arguments = {"path": tmp_path / "saved"}
    for _, layout, _ in on_ranks(3, publish, qwen3, tmp_path, backend="openrlhf", options=options, arguments=arguments):
        sizes = {t.name: torch.Size(t.shape).numel() for t in layout.tensors}
        own = dict.fromkeys(sizes, 0)
        for region in layout.regions:
            own[region.tensor] += region.numel
        assert all(n <= -(-sizes[name] // 3) for name, n in own.items())


def follow(trainer: OpenRLHFTrainer, state: Path, saved: list[Path]) -> list[list[torch.Tensor]]:
    """What one source publishes at the start, after steps, and after a state was loaded; beside each, a saved directory."""
    source = trainer.weights()
    regions = source.layout().regions
    source.bind(regions)
    batch = make_batch().shard(dist.get_rank(), dist.get_world_size())
    trainer.train_step(batch)
    trainer.save_state(state)
    published = []
    for move, path in zip(("stay", "step", "load", "step"), saved, strict=True):
        if move == "step":
            trainer.train_step(batch)
        elif move == "load":
            trainer.load_state(state)
        copies = [torch.empty(region.shape) for region in regions]
        source.snapshot(copies)
        trainer.save(path)
        full = load_file(path / "model.safetensors")
        for region, copy in zip(regions, copies, strict=True):
            box = tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
            assert torch.equal(copy, full[region.tensor][box]), (path, region)
        published.append(copies)
    return published


@STAGES
def test_a_source_follows_the_weights_through_steps_and_a_loaded_state(qwen3: Path, tmp_path: Path, stage: int) -> None:
    arguments = {"state": tmp_path / "state", "saved": [tmp_path / f"saved-{i}" for i in range(4)]}
    options = {"zero_stage": stage}
    for first, stepped, loaded, again in on_ranks(
        2, follow, qwen3, tmp_path, backend="openrlhf", options=options, arguments=arguments
    ):
        assert any(not torch.equal(a, b) for a, b in zip(first, stepped, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, loaded, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stepped, again, strict=True))


def go_on(trainer: OpenRLHFTrainer, state: Path, path: Path, *, resume: bool) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Two steps, of three of warm-up, with the state of the first saved between them or loaded; and the random numbers then."""
    batches = [make_batch(seed=i, step=i).shard(dist.get_rank(), dist.get_world_size()) for i in (1, 2, 3)]
    if resume:
        trainer.load_state(state)
    else:
        trainer.train_step(batches[0])
        torch.rand(3)
        trainer.save_state(state)
    metrics = [trainer.train_step(batch) for batch in batches[1:]]
    trainer.save(path)
    return metrics, torch.rand(4)


@STAGES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_trainer_goes_on_exactly(qwen3: Path, tmp_path: Path, dtype: str, stage: int) -> None:
    settings: dict[str, Any] = {"backend": "openrlhf", "options": {"zero_stage": stage, "dtype": dtype}, "warmup_steps": 3}
    arguments = {"state": tmp_path / "state", "path": tmp_path / "whole", "resume": False}
    whole = on_ranks(2, go_on, qwen3, tmp_path, **settings, arguments=arguments)
    arguments |= {"path": tmp_path / "resumed", "resume": True}
    resumed = on_ranks(2, go_on, qwen3, tmp_path, **settings, arguments=arguments)
    for (metrics, random), (other, drawn) in zip(whole, resumed, strict=True):
        assert metrics == other
        assert torch.equal(random, drawn)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def save_the_state(trainer: OpenRLHFTrainer, path: Path) -> None:
    trainer.train_step(make_batch().shard(dist.get_rank(), dist.get_world_size()))
    trainer.save_state(path)


def load_the_states(trainer: OpenRLHFTrainer, paths: list[Path], saved: Path) -> list[str]:
    """What is said of each, with the weights saved afterwards."""
    said = []
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            trainer.load_state(path)
        said.append(str(caught.value))
    trainer.save(saved)
    return said


def refusals(model: Path, tmp_path: Path, states: list[Path], *, ranks: int, stage: int) -> list[str]:
    """What both ranks, or one, say of each state; the weights are still those of the model's directory."""
    saved = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    arguments, options = {"paths": states, "saved": saved}, {"zero_stage": stage}
    said = on_ranks(ranks, load_the_states, model, tmp_path, backend="openrlhf", options=options, arguments=arguments)
    before, after = (load_file(path / "model.safetensors") for path in (model, saved))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(each == said[0] for each in said)
    return [str(text) for text in said[0]]


@STAGES
def test_a_state_that_does_not_fit_is_refused_on_each_rank(qwen3: Path, tmp_path: Path, stage: int) -> None:
    state, options = tmp_path / "state", {"zero_stage": stage}
    on_ranks(2, save_the_state, qwen3, tmp_path, backend="openrlhf", options=options, arguments={"path": state})
    other = 5 - stage
    (said,) = refusals(qwen3, tmp_path, [state], ranks=2, stage=other)
    assert f"is a state of ZeRO stage {stage}, and this trainer's is {other}" in said
    assert f"trainer.zero_stage={stage}" in said
    (said,) = refusals(qwen3, tmp_path, [state], ranks=1, stage=stage)
    assert "is the state of 2 trainer ranks, and there are 1" in said
    untied = tiny_qwen3(tmp_path / "untied", tied=False)
    (said,) = refusals(untied, tmp_path, [state], ranks=2, stage=stage)
    assert "is the state of another model: 'lm_head.weight'" in said


@STAGES
def test_a_damaged_state_is_refused_on_each_rank(qwen3: Path, tmp_path: Path, stage: int) -> None:
    state, options = tmp_path / "state", {"zero_stage": stage}
    on_ranks(2, save_the_state, qwen3, tmp_path, backend="openrlhf", options=options, arguments={"path": state})
    files = sorted(state.rglob("*.pt"))
    assert len(files) >= 5  # of each rank parameters or moments, and random numbers
    damaged = [tmp_path / f"damaged-{file.name}" for file in files]
    for copy, file in zip(damaged, files, strict=True):
        shutil.copytree(state, copy)
        (copy / file.relative_to(state)).write_bytes(file.read_bytes()[:-100])
    nothing, *said = refusals(qwen3, tmp_path, [tmp_path, *damaged], ranks=2, stage=stage)
    assert "holds no trainer state" in nothing
    for text, file in zip(said, files, strict=True):
        assert f"{file.name} had {file.stat().st_size} bytes" in text
