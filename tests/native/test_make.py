from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from rlbridge.errors import ModelError
from rlbridge.roles.batch import Sampling
from rlbridge.roles.generator import GeneratorContext
from rlbridge_native.generator import NativeGenerator
from rlbridge_native.make import make_arithmetic
from rlbridge_native.options import NativeGeneratorOptions


def quiet(_: str) -> None:
    pass


def pairs(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "arithmetic"
    make_arithmetic(path, 0, quiet, steps=1)
    return path


def test_answers_are_sums_with_the_last_digit_first(directory: Path) -> None:
    for pair in pairs(directory / "prompts.jsonl") + pairs(directory / "held_out.jsonl"):
        a, b = pair["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(pair["answer"][::-1])
        assert (len(pair["prompt"]), len(pair["answer"])) == (6, 3)


def test_held_out_prompts_are_never_trained_on(directory: Path) -> None:
    prompts = [pair["prompt"] for pair in pairs(directory / "prompts.jsonl")]
    held_out = [pair["prompt"] for pair in pairs(directory / "held_out.jsonl")]
    assert len(held_out) == 256
    assert sum(int(p[1]) + int(p[4]) >= 10 for p in held_out) == 128
    assert len(set(prompts + held_out)) == len(prompts) + len(held_out) == 8100


def test_tokenizer_is_one_token_a_character_and_adds_none(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("37+85=")["input_ids"]
    assert ids == tokenizer("37+85=", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "37+85="
    assert tokenizer.chat_template is None


def test_model_tokenizer_and_generation_config_agree(directory: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(directory), AutoConfig.from_pretrained(directory)
    generation = GenerationConfig.from_pretrained(directory)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(config, name) == getattr(generation, name)
    assert len(tokenizer) <= config.vocab_size
    assert config.vocab_size % 64 == 0


def test_a_seed_gives_one_model(directory: Path, tmp_path: Path) -> None:
    make_arithmetic(tmp_path / "again", 0, quiet, steps=1)
    make_arithmetic(tmp_path / "other", 1, quiet, steps=1)
    for file in ("model.safetensors", "prompts.jsonl", "held_out.jsonl"):
        assert (tmp_path / "again" / file).read_bytes() == (directory / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (directory / file).read_bytes()


def test_making_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_arithmetic(tmp_path / "model", 0, quiet, steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_make_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_arithmetic(tmp_path / "model", 0, quiet, steps=1)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused_and_kept(directory: Path) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(ModelError, match="exists already"):
        make_arithmetic(directory, 0, quiet)
    assert sorted(directory.iterdir()) == before


@pytest.mark.slow
def test_a_made_model_is_right_about_half_of_the_time_and_now_and_then_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "model"
    make_arithmetic(path, 0, quiet)
    tokenizer, generator, options = AutoTokenizer.from_pretrained(path), NativeGenerator(), NativeGeneratorOptions()
    generator.setup(GeneratorContext(0, 1, "cpu", str(path), 0, False, options.model_dump()), options)
    held_out = pairs(path / "held_out.jsonl")
    prompts = [tokenizer(pair["prompt"])["input_ids"] for pair in held_out]
    completions = generator.generate(prompts, Sampling(max_tokens=4, temperature=0.0))
    answers = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    right = sum(answer == pair["answer"] for answer, pair in zip(answers, held_out, strict=True)) / len(held_out)
    assert 0.45 <= right < 0.6
    sampled = generator.generate(prompts * 16, Sampling(max_tokens=4, seed=0))
    texts = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in sampled]
    solved = {i % len(held_out) for i, text in enumerate(texts) if text == held_out[i % len(held_out)]["answer"]}
    assert len(solved) / len(held_out) > 0.8
