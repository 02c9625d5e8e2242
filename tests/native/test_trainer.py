"""The native trainer on one and two real ranks, against transformers and formulas written out straight."""

from __future__ import annotations

import itertools
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbridge.errors import CheckpointError, ModelError, RlbridgeError
from rlbridge.roles.batch import Batch, Sequences
from rlbridge_native.trainer import NativeTrainer
from tests.models import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from tests.native.ranks import EPSILON, make_batch, on_ranks
from tests.native.training import assert_published_whole, assert_same_training, publish, trained


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("make", [tiny_qwen3, partial(tiny_qwen3, tied=True), tiny_qwen3_moe])
def test_two_ranks_train_as_one_does(make: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    alone = trained(model, tmp_path, ranks=1, kl_coef=0.1)
    together = trained(model, tmp_path, ranks=2, kl_coef=0.1)
    assert together[0][0] == together[0][1]
    assert_same_training(alone, together)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_train_as_the_whole_batch_does(qwen3: Path, tmp_path: Path, ranks: int) -> None:
    whole = trained(qwen3, tmp_path, ranks=ranks)
    parts = trained(qwen3, tmp_path, ranks=ranks, options={"micro_batch": 3, "gradient_checkpointing": True})
    assert_same_training(whole, parts)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_passes_over_fp32_weights_train_nearly_as_fp32_does(qwen3: Path, tmp_path: Path, ranks: int) -> None:
    exact = trained(qwen3, tmp_path, ranks=ranks)
    mixed = trained(qwen3, tmp_path, ranks=ranks, options={"compute_dtype": "bfloat16"})
    assert {tensor.dtype for tensor in mixed[1].values()} == {torch.float32}
    assert mixed[0][0] != exact[0][0]
    for one, other in zip(mixed[0][0], exact[0][0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)  # bf16 has 8 bits: log-probs of 4 are known to 0.02
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    for name, tensor in mixed[1].items():
        torch.testing.assert_close(tensor, exact[1][name], rtol=0, atol=2e-2, msg=name)


def straight_training(trainer: NativeTrainer, model: Path, batches: list[Batch]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The same steps from the paper's formulas, token by token, with a plain model and optimizer."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(model).train() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=EPSILON, weight_decay=0.01)
    metrics = []
    for step, batch in enumerate(batches, 1):
        sequences, terms = batch.sequences, []
        for row, (first, last) in enumerate(zip(sequences.prompt_lengths_B, sequences.lengths_B, strict=True)):
            tokens = torch.tensor(sequences.tokens_BT[row : row + 1, :last], dtype=torch.long)
            logp_TV = (policy(tokens).logits[0] / sequences.temperature).log_softmax(-1)
            with torch.no_grad():
                reference_TV = (reference(tokens).logits[0] / sequences.temperature).log_softmax(-1)
            for at in range(first, last):
                logp, ref = logp_TV[at - 1, tokens[0, at]], reference_TV[at - 1, tokens[0, at]]
                ratio = torch.exp(logp - float(batch.logprobs_BT[row, at]))
                advantage = float(batch.advantages_B[row])
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                kl = torch.exp(ref - logp) - (ref - logp) - 1
                entropy = -(logp_TV[at - 1].exp() * logp_TV[at - 1]).sum()
                clipped = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
                terms.append((-surrogate + 0.1 * kl, kl.detach(), float(clipped), ratio.detach(), entropy.detach()))
        loss = sum(term[0] for term in terms) / batch.total_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step / 2)
        optimizer.step()
        optimizer.zero_grad()
        kl, clipped, ratio, entropy = (float(sum(t[i] for t in terms)) / len(terms) for i in range(1, 5))
        lr = optimizer.param_groups[0]["lr"]
        means = {"clip_fraction": clipped, "ratio_mean": ratio, "entropy": entropy, "kl": kl, "lr": lr}
        metrics.append({"loss": float(loss.detach()), "grad_norm": float(norm)} | means)
    return [metrics], {name: parameter.detach() for name, parameter in policy.named_parameters()}


def test_the_loss_is_the_papers(qwen3: Path, tmp_path: Path) -> None:
    batches = [make_batch(seed=1, temperature=0.8), make_batch(seed=2, temperature=0.8, step=2)]
    (expected,) = on_ranks(1, straight_training, qwen3, tmp_path, arguments={"model": qwen3, "batches": batches})
    assert expected[0][0][0]["clip_fraction"] > 0
    assert expected[0][0][0]["grad_norm"] > 1.0  # so that it is clipped
    assert_same_training(trained(qwen3, tmp_path, ranks=1, kl_coef=0.1), expected)


def test_the_kl_is_zero_at_the_reference(qwen3: Path, tmp_path: Path) -> None:
    metrics, _ = trained(qwen3, tmp_path, ranks=1, kl_coef=0.1)
    assert metrics[0][0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics[0][1]["kl"] > 1e-4


def score(trainer: NativeTrainer, sequences: Sequences) -> np.ndarray[Any, Any]:
    return trainer.score(sequences)


@pytest.mark.parametrize(("ranks", "rows"), [(1, 8), (2, 7), (3, 4)])
def test_scores_are_those_of_transformers(qwen3: Path, tmp_path: Path, ranks: int, rows: int) -> None:
    sequences = make_batch(8, temperature=0.7).sequences.rows(slice(0, rows))
    scores = on_ranks(ranks, score, qwen3, tmp_path, arguments={"sequences": sequences}, options={"micro_batch": 2})
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    expected_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    for row, (first, last) in enumerate(zip(sequences.prompt_lengths_B, sequences.lengths_B, strict=True)):
        tokens = torch.tensor(sequences.tokens_BT[row : row + 1, :last], dtype=torch.long)
        with torch.no_grad():
            logp_TV = (model(tokens).logits[0] / 0.7).log_softmax(-1)
        expected_BT[row, first:last] = [logp_TV[at - 1, tokens[0, at]] for at in range(first, last)]
    for found in scores:
        np.testing.assert_allclose(found, expected_BT, atol=2e-5)
        np.testing.assert_array_equal(found, scores[0])


def loss_and_score(trainer: NativeTrainer, batch: Batch) -> tuple[float, np.ndarray[Any, Any]]:
    scores = trainer.score(batch.sequences)
    return trainer.train_step(batch)["loss"], scores


def test_dropout_is_the_configs_in_training_and_absent_from_scores(tmp_path: Path) -> None:
    models = [tiny_qwen3(tmp_path / f"model-{p}", attention_dropout=p) for p in (0.0, 0.5)]
    found = [on_ranks(1, loss_and_score, m, tmp_path, arguments={"batch": make_batch()})[0] for m in models]
    assert found[0][0] != pytest.approx(found[1][0], rel=1e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6)


def save_and_score(trainer: NativeTrainer, path: Path, sequences: Sequences) -> np.ndarray[Any, Any]:
    trainer.train_step(make_batch().shard(trainer._context.rank, 2))
    scores = trainer.score(sequences)
    path.mkdir(exist_ok=True)
    (path / "stale").touch()
    trainer.save(path)
    return scores


@pytest.mark.parametrize("make", [partial(tiny_qwen3, tied=True), tiny_qwen3_moe])
def test_what_is_saved_scores_the_same_in_transformers(make: Any, tmp_path: Path) -> None:
    model, sequences = make(tmp_path / "model"), make_batch(seed=3).sequences
    (scores, _) = on_ranks(2, save_and_score, model, tmp_path, arguments={"path": tmp_path / "saved", "sequences": sequences})
    (again,) = on_ranks(1, score, tmp_path / "saved", tmp_path, arguments={"sequences": sequences})
    np.testing.assert_allclose(scores, again, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([5, 6]) == "23"
    assert not (tmp_path / "saved" / "stale").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def save_on_a_full_disk(trainer: NativeTrainer, path: Path, full_on: int, *, state: bool) -> str:
    """What the error says where one rank's files cannot grow past 4 KB."""
    if trainer._context.rank == full_on:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        trainer.save_state(path) if state else trainer.save(path)
    return caught.value.what


@pytest.mark.parametrize(("state", "full_on"), [(False, 0), (True, 0), (True, 1)])
def test_a_full_disk_fails_the_save_on_every_rank(state: bool, full_on: int, qwen3: Path, tmp_path: Path) -> None:
    arguments = {"path": tmp_path / "saved", "full_on": full_on, "state": state}
    for message in on_ranks(2, save_on_a_full_disk, qwen3, tmp_path, arguments=arguments):
        assert f"could not be written to {tmp_path / 'saved'}" in message
    assert state or not (tmp_path / "saved").exists()


def train_on(trainer: NativeTrainer, state: Path, path: Path, *, resume: bool) -> Any:
    rank, ranks = trainer._context.rank, trainer._context.world_size
    trainer.save_state(state.with_name("untouched"))  # of an optimizer without a step: must change nothing
    if resume:
        trainer.load_state(state)
    else:
        for step in (1, 2):
            trainer.train_step(make_batch(seed=step, step=step).shard(rank, ranks))
        trainer.score(make_batch().sequences)  # FSDP2 leaves parameters gathered after it, unless told otherwise
        trainer.save_state(state)
    noise = torch.rand(3).tolist()
    metrics = [trainer.train_step(make_batch(seed=step, step=step).shard(rank, ranks)) for step in (3, 4)]
    trainer.save(path)
    return noise, metrics


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_exactly_from_a_saved_state(tmp_path: Path, ranks: int) -> None:
    model, state = tiny_qwen3(tmp_path / "model", attention_dropout=0.2), tmp_path / "state"
    through = {"state": state, "path": tmp_path / "through", "resume": False}
    resumed = {"state": state, "path": tmp_path / "resumed", "resume": True}
    one = on_ranks(ranks, train_on, model, tmp_path, arguments=through, warmup_steps=5)
    other = on_ranks(ranks, train_on, model, tmp_path, arguments=resumed, warmup_steps=5)
    assert one == other
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("through", "resumed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def load_only(trainer: NativeTrainer, state: Path) -> None:
    trainer.load_state(state)


def test_the_state_of_another_model_is_refused_by_name(qwen3: Path, tmp_path: Path) -> None:
    wider = tiny_qwen3(tmp_path / "wider", intermediate_size=64)
    state = tmp_path / "state"
    on_ranks(1, train_on, wider, tmp_path, arguments={"state": state, "path": tmp_path / "saved", "resume": False})
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight' is \[64, 32\] float32 there, \[48, 32\] float32 here"):
        on_ranks(2, load_only, qwen3, tmp_path, arguments={"state": state})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight' is \[67, 32\] float32 there, \[67, 32\] bfloat16 here"):
        on_ranks(1, load_only, wider, tmp_path, arguments={"state": state}, options={"dtype": "bfloat16"})


def test_a_damaged_state_is_refused(qwen3: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    on_ranks(2, train_on, qwen3, tmp_path, arguments={"state": state, "path": tmp_path / "saved", "resume": False})
    part = max(state.glob("*.distcp"), key=lambda p: p.name)
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        on_ranks(2, load_only, qwen3, tmp_path, arguments={"state": state})
    with pytest.raises(CheckpointError, match="cannot be read"):
        on_ranks(1, load_only, qwen3, tmp_path, arguments={"state": tmp_path / "nowhere"})


def break_a_step(trainer: NativeTrainer, path: Path, batch: Batch) -> str:
    with pytest.raises(RlbridgeError, match="step 1: the loss is nan") as caught:
        trainer.train_step(batch.shard(trainer._context.rank, trainer._context.world_size))
    trainer.save(path)
    return caught.value.what


def test_a_loss_that_is_not_finite_leaves_the_weights_alone_on_every_rank(qwen3: Path, tmp_path: Path) -> None:
    batch = make_batch()
    batch.advantages_B[0] = np.nan  # a row of rank 0 only
    on_ranks(2, break_a_step, qwen3, tmp_path, arguments={"path": tmp_path / "saved", "batch": batch})
    before, after = (load_file(path / "model.safetensors") for path in (qwen3, tmp_path / "saved"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def _halve_norms(trainer: Any) -> None:
    from transformers.core_model_loading import WeightConverter

    from tests.huggingface.test_checkpoint import Double

    trainer._model._weight_conversions = [WeightConverter("layernorm.weight", "layernorm.weight", operations=[Double()])]


@pytest.mark.parametrize(
    ("make", "ranks", "dtype"),
    [
        (tiny_qwen3, 2, "float32"),
        (partial(tiny_qwen3, tied=True), 2, "bfloat16"),
        (tiny_qwen3_moe, 1, "bfloat16"),
        (tiny_qwen3_moe, 2, "float32"),
        (tiny_qwen3_moe, 4, "float32"),
    ],
)
def test_the_ranks_publish_each_saved_element_once(make: Any, ranks: int, dtype: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    results = on_ranks(ranks, publish, model, tmp_path, arguments={"path": tmp_path / "saved"}, options={"dtype": dtype})
    assert {kind for kind, _, _ in results} == {"ShardedSource"}
    assert_published_whole(results, load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(layout.regions for _, layout, _ in results)
    assert not [t for t in results[0][1].tensors if t.alias_of not in (None, "model.embed_tokens.weight")]


def test_a_model_whose_checkpoint_is_computed_is_gathered(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    results = on_ranks(2, publish, model, tmp_path, arguments={"path": tmp_path / "saved", "before": _halve_norms})
    assert {kind for kind, _, _ in results} == {"GatheredSource"}
    assert_published_whole(results, load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(layout.regions for _, layout, _ in results)


@pytest.mark.parametrize("break_it", ["nothing", "weights", "tensor"])
def test_a_directory_without_a_whole_model_is_refused(break_it: str, qwen3: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tiny_qwen3(tmp_path / "model")
    file = path / "model.safetensors"
    if break_it == "nothing":
        (path / "config.json").unlink()
    elif break_it == "weights":
        file.write_bytes(file.read_bytes()[:100])
    else:
        kept = dict(itertools.islice(load_file(file).items(), 5))
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=str(path)):
        on_ranks(1, load_only, path, tmp_path)


def test_hooks_and_options_import_no_framework() -> None:
    code = "import sys, rlbridge_native, rlbridge_native.options; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
