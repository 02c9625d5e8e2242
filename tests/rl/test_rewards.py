import sys
import threading

import numpy as np
import pytest

from rlbridge.errors import ConfigError, PluginError, RewardError
from rlbridge.plugins import registry
from rlbridge.rl.builtin_rewards import exact_match, numeric
from rlbridge.rl.prompts import Prompt
from rlbridge.rl.rewards import resolve_reward, score_completions

SUM = Prompt(7, "1+1", "2", {"prompt": "1+1", "answer": 2, "level": "easy", "not a name": 1}, "p.jsonl:8")


def score(fn, completion="2", prompt=SUM):
    return score_completions(fn, [prompt], [completion])[0]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "length_rewards.py").write_text("limit = 3\ndef short(completion):\n    return len(completion) < limit\n")
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    return tmp_path


def test_named_rewards_are_found():
    assert resolve_reward("exact_match", registry()) is exact_match
    assert resolve_reward("numeric", registry()) is numeric


def test_an_unknown_reward_is_named_with_the_nearest():
    with pytest.raises(PluginError, match=r"'numerik'(.|\n)*numeric"):
        resolve_reward("numerik", registry())


def test_a_function_of_the_working_directory_is_imported(working_directory):
    assert score(resolve_reward("length_rewards:short", registry())) == 1.0


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("lenght_rewards:short", "'length_rewards'"),
        ("length_rewards:shirt", "'short'"),
        ("length_rewards:limit", "is a int, not a function"),
        ("broken_rewards:any", "no_such_package"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(working_directory, spec, match):
    with pytest.raises(ConfigError, match=rf"(?s){spec.partition(':')[0]}.*{match}"):
        resolve_reward(spec, registry())


def test_a_reward_gets_all_that_it_accepts():
    def everything(**given):
        assert given == {"prompt": "1+1", "completion": "2", "answer": "2", "level": "easy"}
        return 1

    def some(completion, *, level, more=0.25):
        return more if (completion, level) == ("2", "easy") else 0

    assert score(everything) == 1.0
    assert score(some) == 0.25


def test_of_a_chat_the_reward_gets_the_last_message():
    chat = Prompt(0, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], None, {}, "p.jsonl:1")
    assert score(lambda prompt: prompt == "b", prompt=chat) == 1.0


def test_rewards_are_float32_in_order():
    rewards = score_completions(lambda completion: len(completion), [SUM] * 3, ["a", "", "abc"])
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1, 0, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, None, "1.0", [1]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(RewardError) as error:
        score(lambda completion: value)
    assert isinstance(error.value.__cause__, TypeError | ValueError)


def test_a_reward_that_raises_is_reported_with_prompt_and_completion():
    def picky(completion, missing):
        return missing

    with pytest.raises(RewardError, match=r"(?s)picky.*TypeError.*prompt 7: '1\+1'.*completion: 'xxx.*p\.jsonl:8") as error:
        score(picky, completion="x" * 500)
    assert isinstance(error.value.__cause__, TypeError)
    assert "x" * 121 not in str(error.value)


def test_exact_match_ignores_white_space_around_alone():
    assert exact_match(" 2\n", "2 ") == 1.0
    assert exact_match("2.0", "2") == 0.0


def test_a_reward_that_needs_an_answer_says_so():
    with pytest.raises(RewardError, match=r"data\.answer_key"):
        score(exact_match, prompt=Prompt(0, "a", None, {}, "p.jsonl:1"))


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so it is 2.", "2", 1.0),
        (r"the answer is \boxed{0.5}", r"\frac{1}{2}", 1.0),
        ("$1,000$", "1000", 1.0),
        ("#### 72", "48 + 24 = 72\n#### 72", 1.0),
        ("$2x + 1$", "2x+1", 1.0),
        ("2", "2x+1", 0.0),
        ("first 2, then 3", "2", 0.0),
        ("no idea", "2", 0.0),
        ("", "2", 0.0),
        ("2", "nobody knows", 0.0),
    ],
)
def test_numeric_compares_values(completion, answer, reward):
    assert numeric(completion, answer) == reward


@pytest.mark.slow
def test_numeric_gives_up_on_a_tower_of_powers():
    assert numeric("9^9^9^9", "2") == 0.0


def test_numeric_works_off_the_main_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend([numeric("it is 2", "2"), numeric("it is 3", "2")]))
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0]
