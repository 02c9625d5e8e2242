import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbridge.errors import DataError
from rlbridge.rl.prompts import Prompt, PromptStream, read_prompts, split_held_out, tokenize

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def prompt(index: int, text=None) -> Prompt:
    return Prompt(index, f"prompt {index}" if text is None else text, None, {}, f"p.jsonl:{index + 1}")


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_jsonl_gives_text_answer_record_and_the_line_it_came_from(tmp_path):
    path = written(tmp_path / "p.jsonl", '{"prompt": "1+1", "answer": 2, "level": "easy"}', "", json.dumps({"prompt": CHAT}))
    first, second = read_prompts(path, "prompt", "answer")
    assert (first.index, first.text, first.answer, first.source) == (0, "1+1", "2", "p.jsonl:1")
    assert first.fields["level"] == "easy"
    assert (second.index, second.text, second.answer, second.source) == (1, CHAT, None, "p.jsonl:3")
    assert second.question == "hi"


def test_a_byte_order_mark_and_line_separators_inside_of_strings_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes("\ufeff".encode() + '{"prompt": "a\u2028b"}\n'.encode())
    assert [p.text for p in read_prompts(path, "prompt", None)] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "' + "x" * 500, ["line 2", "not JSON", "..."]),
        ("[1, 2]", ["line 2", "not a JSON object", "[1, 2]"]),
        ('{"question": "a", "id": 1}', ["p.jsonl:2", "'prompt'", "'question'", "'id'"]),
        ('{"prompt": 3}', ["p.jsonl:2", "neither a string nor a list of chat messages"]),
        ('{"prompt": []}', ["p.jsonl:2", "neither a string nor a list of chat messages"]),
        ('{"prompt": [{"role": "user"}]}', ["p.jsonl:2", "neither a string nor a list of chat messages"]),
        ('{"prompt": "a", "answer": [1]}', ["p.jsonl:2", "'answer'", "neither a string nor a number"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = written(tmp_path / "p.jsonl", '{"prompt": "good"}', line)
    with pytest.raises(DataError) as error:
        read_prompts(path, "prompt", "answer")
    assert [word for word in words if word not in str(error.value)] == []
    assert "x" * 121 not in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_prompts(tmp_path / "p.jsonl", "prompt", None)


@pytest.mark.parametrize(
    ("name", "match"), [("absent.jsonl", "there is no"), ("p.csv", r"\.jsonl.*\.parquet"), ("e.jsonl", "no prompts")]
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, name, match):
    (tmp_path / "p.csv").write_text("prompt\n")
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=match):
        read_prompts(tmp_path / name, "prompt", None)


def test_parquet_gives_prompts_with_their_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"q": [CHAT, CHAT], "a": [1, None]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    first, second = read_prompts(tmp_path / "p.parquet", "q", "a")
    assert (first.text, first.answer, first.source) == (CHAT, "1", "p.parquet:0")
    assert (second.answer, second.source) == (None, "p.parquet:1")


def test_what_is_no_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_prompts(written(tmp_path / "p.parquet", "x"), "q", None)


def test_a_dataset_directory_gives_its_train_split_or_its_only_one(tmp_path):
    import datasets

    rows = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("train", "test", "dev")}
    saved = {
        "plain": rows["dev"],
        "both": datasets.DatasetDict({"test": rows["test"], "train": rows["train"]}),
        "single": datasets.DatasetDict({"test": rows["test"]}),
        "neither": datasets.DatasetDict({"test": rows["test"], "dev": rows["dev"]}),
    }
    for name, dataset in saved.items():
        dataset.save_to_disk(tmp_path / name)
    texts = [read_prompts(tmp_path / name, "prompt", None)[0].text for name in ("plain", "both", "single")]
    assert texts == ["dev", "train", "test"]
    with pytest.raises(DataError, match="test, dev"):
        read_prompts(tmp_path / "neither", "prompt", None)


def test_a_directory_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="save_to_disk"):
        read_prompts(tmp_path, "prompt", None)


def test_the_last_prompts_are_held_out():
    train, held_out = split_held_out([prompt(i) for i in range(5)], 2)
    assert [p.index for p in train] == [0, 1, 2]
    assert [p.index for p in held_out] == [3, 4]
    assert split_held_out(train, 0) == (train, [])
    with pytest.raises(DataError, match="none is left"):
        split_held_out(train, 3)


SIZES = {"count": st.integers(1, 20), "size": st.integers(1, 50), "seed": st.integers(0, 2**32)}


@settings(deadline=None)
@given(**SIZES)
def test_every_epoch_is_a_permutation(count, size, seed):
    stream = PromptStream([prompt(i) for i in range(count)], seed)
    steps = -(-3 * count // size)
    indices = [p.index for step in range(1, steps + 1) for p in stream.batch(step, size)]
    for epoch in range(3):
        assert sorted(indices[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(**SIZES, step=st.integers(1, 1000))
def test_a_batch_depends_on_seed_step_and_size_alone(count, size, seed, step):
    prompts = [prompt(i) for i in range(count)]
    used = PromptStream(prompts, seed)
    used.batch(step + 1, size)
    assert used.batch(step, size) == PromptStream(prompts, seed).batch(step, size)
    assert len(used.batch(step, size)) == size


def test_another_seed_and_another_epoch_give_another_order():
    prompts = [prompt(i) for i in range(50)]
    orders = [PromptStream(prompts, seed).batch(epoch, 50) for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(p.index for p in order) for order in orders}) == 4


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "hi": 1, "user": 2, "assistant": 3, "system": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    )
    yield tokenizer
    tokenizer.chat_template = None


def test_plain_prompts_become_tokens(tokenizer):
    assert tokenize([prompt(0, "hi hi"), prompt(1, "hi user")], tokenizer, chat=False) == [[1, 1], [1, 2]]


def test_a_chat_ends_where_the_assistant_speaks(chat_tokenizer):
    chat = [{"role": "system", "content": "hi"}, {"role": "user", "content": "hi"}]
    assert tokenize([prompt(0, "hi"), prompt(1, chat)], chat_tokenizer, chat=True) == [[2, 1, 3], [4, 1, 2, 1, 3]]


def test_a_prompt_that_the_chat_template_refuses_is_named(chat_tokenizer):
    with pytest.raises(DataError, match=r"no tools here.*p\.jsonl:1"):
        tokenize([prompt(0, [{"role": "tool", "content": "hi"}])], chat_tokenizer, chat=True)


@pytest.mark.parametrize(
    ("text", "chat", "match"),
    [("hi", True, "no chat template"), (CHAT, False, r"data.chat=true|p\.jsonl:1"), ("", False, r"no tokens.*p\.jsonl:1")],
)
def test_what_gives_no_tokens_is_refused(tokenizer, text, chat, match):
    with pytest.raises(DataError, match=match):
        tokenize([prompt(0, text)], tokenizer, chat)
