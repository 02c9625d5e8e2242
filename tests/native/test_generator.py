from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from rlbridge.errors import DataError, LayoutError, ModelError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, export_full
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.sink import RecordedSink
from rlbridge_native.decoding import pick
from rlbridge_native.generator import NativeGenerator, checkpoint_loader
from rlbridge_native.loading import load_model
from rlbridge_native.options import NativeGeneratorOptions
from tests.models import CHARACTERS, VOCABULARY, tiny_llama, tiny_qwen3, tiny_qwen3_moe

PROMPTS = [[5, 9, 12], [5, 9, 12], [7], [4, 30, 31, 32, 6, 8, 9], [5, 9, 12], [20, 21, 22, 23]]
"""Of several lengths, so that they are padded, and some of them equal, so that they are read once."""
EOS = 1


def made(path: Path, seed: int = 0, **options: Any) -> NativeGenerator:
    generator = NativeGenerator()
    parsed = NativeGeneratorOptions(**options)
    generator.setup(GeneratorContext(0, 1, "cpu", str(path), seed, False, parsed.model_dump()), parsed)
    return generator


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def generator(path: Path) -> NativeGenerator:
    return made(path)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def logprobs_where_sampled(completions: list[Completion], scores_BT: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    pairs = zip(PROMPTS, completions, scores_BT, strict=True)
    return [scores_T[len(p) : len(p) + len(c.token_ids)] for p, c, scores_T in pairs]


@pytest.mark.parametrize("model", [tiny_qwen3, tiny_qwen3_moe, tiny_llama])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampled_tokens_are_those_that_score_gives(tmp_path: Path, model: Any, temperature: float) -> None:
    generator = made(model(tmp_path / "model"))
    sampling = Sampling(max_tokens=16, temperature=temperature, top_k=20, top_p=0.9, seed=1)
    completions = generator.generate(PROMPTS, sampling)
    scores_BT = generator.score(pad_sequences(PROMPTS, tokens(completions), temperature=temperature))
    assert scores_BT.dtype == np.float32
    for completion, scored in zip(completions, logprobs_where_sampled(completions, scores_BT), strict=True):
        np.testing.assert_allclose(completion.logprobs, scored, atol=1e-5, rtol=0)


def test_score_is_zero_outside_of_completions_and_the_same_in_small_batches(path: Path, generator: NativeGenerator) -> None:
    sequences = pad_sequences(PROMPTS, tokens(generator.generate(PROMPTS, Sampling(max_tokens=8, seed=1))))
    scores_BT = generator.score(sequences)
    assert not scores_BT[~sequences.completion_mask_BT()].any()
    assert (scores_BT[sequences.completion_mask_BT()] < 0).all()
    np.testing.assert_allclose(made(path, batch=2).score(sequences), scores_BT, atol=1e-5, rtol=0)


def test_a_seed_fixes_the_tokens_of_a_call(path: Path, generator: NativeGenerator) -> None:
    sampling = Sampling(max_tokens=12, seed=3)
    first = tokens(generator.generate(PROMPTS, sampling))
    assert tokens(generator.generate(PROMPTS, sampling)) == first
    assert tokens(made(path).generate(PROMPTS, sampling)) == first
    assert tokens(generator.generate(PROMPTS, Sampling(max_tokens=12, seed=4))) != first


def test_without_a_seed_calls_differ_and_runs_do_not(path: Path) -> None:
    one, same, other = made(path), made(path), made(path, seed=9)
    sampling = Sampling(max_tokens=12)
    first, second = tokens(one.generate(PROMPTS, sampling)), tokens(one.generate(PROMPTS, sampling))
    assert first != second
    assert [tokens(same.generate(PROMPTS, sampling)), tokens(same.generate(PROMPTS, sampling))] == [first, second]
    assert tokens(other.generate(PROMPTS, sampling)) != first


def test_sampling_leaves_the_global_random_state_alone(generator: NativeGenerator) -> None:
    before = torch.get_rng_state()
    generator.generate(PROMPTS, Sampling(max_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_greedy_tokens_are_those_of_transformers_generate(path: Path, batch: int) -> None:
    generator = made(path, batch=batch)
    model = load_model(str(path), dtype="float32", attn_implementation="sdpa", trust_remote_code=False)
    completions = generator.generate(PROMPTS, Sampling(max_tokens=20, temperature=0.0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected_1T = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert completion.token_ids == expected_1T[0, len(prompt) :].tolist()


def test_greedy_logprobs_are_at_temperature_1(generator: NativeGenerator) -> None:
    completions = generator.generate(PROMPTS, Sampling(max_tokens=6, temperature=0.0))
    scores_BT = generator.score(pad_sequences(PROMPTS, tokens(completions), temperature=1.0))
    for completion, scored in zip(completions, logprobs_where_sampled(completions, scores_BT), strict=True):
        np.testing.assert_allclose(completion.logprobs, scored, atol=1e-5, rtol=0)


def test_top_k_of_1_and_a_tiny_top_p_are_greedy(generator: NativeGenerator) -> None:
    greedy = tokens(generator.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.0)))
    assert tokens(generator.generate(PROMPTS, Sampling(max_tokens=12, top_k=1, seed=0))) == greedy
    assert tokens(generator.generate(PROMPTS, Sampling(max_tokens=12, top_p=1e-6, seed=0))) == greedy


@pytest.mark.parametrize(
    ("cut", "allowed"),
    [({}, {0, 1, 2, 3}), ({"top_k": 3}, {0, 1, 2}), ({"top_p": 0.75}, {0, 1}), ({"top_p": 0.85}, {0, 1, 2}),
     ({"top_k": 2, "top_p": 0.6}, {0}), ({"top_k": 9}, {0, 1, 2, 3})],
)  # fmt: skip
def test_cuts_leave_the_likeliest_tokens_and_their_logprobs(cut: dict[str, Any], allowed: set[int]) -> None:
    probs_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits_RV = probs_V.log().expand(4000, -1)
    tokens_R, logprobs_R = pick(logits_RV, Sampling(1, **cut), torch.Generator().manual_seed(0))
    assert set(tokens_R.tolist()) == allowed
    torch.testing.assert_close(logprobs_R, probs_V.log()[tokens_R])
    shares_V = torch.bincount(tokens_R, minlength=4) / 4000
    kept_V = torch.where(torch.tensor([token in allowed for token in range(4)]), probs_V, 0.0)
    torch.testing.assert_close(shares_V, kept_V / kept_V.sum(), atol=0.03, rtol=0)


def test_end_of_sequence_is_kept_and_ends_a_completion(generator: NativeGenerator) -> None:
    completions = generator.generate(PROMPTS * 8, Sampling(max_tokens=60, temperature=2.0, seed=0))
    reasons = {completion.finish_reason for completion in completions}
    assert reasons == {"stop", "length"}
    for completion in completions:
        ended = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] == EOS) == ended
        assert EOS not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 60
        assert len(completion.logprobs) == len(completion.token_ids)


def test_stop_tokens_of_the_call_end_a_completion(generator: NativeGenerator) -> None:
    stop = [VOCABULARY.index(character) for character in "aeiou"]
    completions = generator.generate(PROMPTS * 4, Sampling(max_tokens=60, seed=0, stop_token_ids=tuple(stop)))
    assert any(completion.token_ids[-1] in stop and completion.finish_reason == "stop" for completion in completions)
    assert not any(set(stop) & set(completion.token_ids[:-1]) for completion in completions)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(generator: NativeGenerator) -> None:
    free = Sampling(max_tokens=24, seed=5)
    prompts = PROMPTS[3:4]
    whole = generator.generate(prompts, free)[0].token_ids
    at = next(i for i in range(5, 20) if all(3 <= token < 3 + len(CHARACTERS) for token in whole[i : i + 2]))
    stop = "".join(VOCABULARY[token] for token in whole[at : at + 2])
    completion = generator.generate(prompts, Sampling(max_tokens=24, seed=5, stop=("never there", stop)))[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole[: at + 2]


def test_versions_are_that_of_the_generator(path: Path) -> None:
    generator = made(path)
    generator.version = 7
    completion = generator.generate([[5, 6]], Sampling(max_tokens=4, seed=0))[0]
    assert completion.versions == [7] * len(completion.token_ids)


def test_no_prompts_and_no_tokens_give_nothing(generator: NativeGenerator) -> None:
    assert generator.generate([], Sampling(max_tokens=4)) == []
    assert generator.generate([[5]], Sampling(max_tokens=0)) == [Completion([], [], [], "length")]


def test_an_empty_prompt_is_refused(generator: NativeGenerator) -> None:
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generator.generate([[5], []], Sampling(max_tokens=4))


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    generator = made(path)
    assert generator.generate([[5]], Sampling(max_tokens=1))
    with pytest.raises(ModelError, match="no tokenizer"):
        generator.generate([[5]], Sampling(max_tokens=1, stop=("a",)))


@pytest.mark.parametrize("broken", ["absent", "empty", "no weights", "not a causal language model"])
def test_a_directory_without_a_model_is_a_model_error(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "model"
    if broken == "empty":
        path.mkdir()
    if broken in ("no weights", "not a causal language model"):
        tiny_qwen3(path)
        (path / "model.safetensors").unlink()
    if broken == "not a causal language model":
        (path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="model"):
        made(path)


@pytest.mark.parametrize("model", [tiny_qwen3, tiny_qwen3_moe])
def test_loader_fills_a_model_with_anothers_checkpoint(tmp_path: Path, model: Any) -> None:
    served = made(model(tmp_path / "old", seed=0))
    trained = made(model(tmp_path / "new", seed=1))
    checkpoint_loader(served._model)((name, tensor.clone()) for name, tensor in export_full(trained._model))
    sampling = Sampling(max_tokens=8, temperature=0.0)
    assert tokens(served.generate(PROMPTS, sampling)) == tokens(trained.generate(PROMPTS, sampling))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", [tiny_qwen3, tiny_qwen3_moe])
def test_recorded_layout_is_the_whole_checkpoint(tmp_path: Path, model: Any, tied: bool) -> None:
    generator = made(model(tmp_path / "model", tied=tied))
    published, pieces = checkpoint_pieces(generator._model)
    sink = generator._subscriber._sink
    assert isinstance(sink, RecordedSink)
    layout = sink.record(published)
    assert sum(region.numel for region in layout.regions) == sum(piece.region.numel for piece in pieces)
    assert {region.tensor for region in layout.regions} == {t.name for t in published if t.alias_of is None}


@pytest.mark.parametrize(("name", "shape"), [("model.norm.scale", (32,)), ("model.norm.weight", (33,))])
def test_loader_refuses_a_tensor_that_the_model_has_not(path: Path, name: str, shape: tuple[int, ...]) -> None:
    model = load_model(str(path), dtype="float32", attn_implementation="sdpa", trust_remote_code=False)
    with pytest.raises(LayoutError, match=name):
        checkpoint_loader(model)([(name, torch.zeros(shape))])


def test_the_only_rank_answers_the_session(generator: NativeGenerator) -> None:
    answers = generator.on_each_rank("state", msgspec.msgpack.encode([b""]))
    assert len(answers) == 1
