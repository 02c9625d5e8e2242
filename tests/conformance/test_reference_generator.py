"""The reference generator: what it samples and scores, what it refuses, and what has to follow on new weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlbridge.errors import ConfigError, DataError, LayoutError, ModelError
from rlbridge.roles.batch import Sampling, pad_sequences
from tests.conformance.reference_parties import make_generator, some_sequences


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
