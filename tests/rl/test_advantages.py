import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlbridge.errors import RlbridgeError
from rlbridge.rl.advantages import build_batch, group_advantages
from rlbridge.roles.batch import Completion

GROUPS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=st.floats(-10, 10, width=32))


@settings(deadline=None)
@given(GROUPS, st.sampled_from(["group_std", "group_mean"]))
def test_advantages_of_a_group_have_mean_zero_and_the_order_of_its_rewards(rewards_PG, normalise):
    advantages_PG = group_advantages(rewards_PG, normalise)
    assert advantages_PG.dtype == np.float32
    np.testing.assert_allclose(advantages_PG.mean(axis=1), 0, atol=1e-5)
    for rewards_G, advantages_G in zip(rewards_PG, advantages_PG, strict=True):
        assert (np.diff(advantages_G[np.argsort(rewards_G)]) >= 0).all()


@settings(deadline=None)
@given(st.floats(-10, 10), st.integers(1, 16), st.sampled_from(["group_std", "group_mean"]))
@example(0.1, 3, "group_mean")
def test_equal_rewards_give_exact_zeros(reward, size, normalise):
    assert not group_advantages(np.full((2, size), reward), normalise).any()


def test_the_two_normalisations_differ_in_the_std_alone():
    rewards_PG = np.array([[0, 0, 0, 1], [1, 3, 1, 3]], dtype=np.float32)
    np.testing.assert_allclose(group_advantages(rewards_PG, "group_mean"), [[-0.25, -0.25, -0.25, 0.75], [-1, 1, -1, 1]])
    expected = (rewards_PG - rewards_PG.mean(1, keepdims=True)) / (rewards_PG.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards_PG, "group_std"), expected, rtol=1e-6)


def test_a_batch_holds_each_number_at_its_token():
    completions = [Completion([4, 5], [-0.5, -0.25], [3, 4], "stop"), Completion([6], [-1.0], [4], "length")]
    advantages_PG = np.array([[1.0, -1.0]])
    batch = build_batch([[1], [1, 2, 3]], completions, advantages_PG, temperature=0.7, pad=9, step=5)
    assert batch.sequences.tokens_BT.tolist() == [[1, 4, 5, 9], [1, 2, 3, 6]]
    assert batch.logprobs_BT.tolist() == [[0, -0.5, -0.25, 0], [0, 0, 0, -1]]
    assert batch.versions_BT.tolist() == [[-1, 3, 4, -1], [-1, -1, -1, 4]]
    assert batch.advantages_B.tolist() == [1, -1]
    assert (batch.total_tokens, batch.step, batch.sequences.temperature) == (3, 5, 0.7)
    assert (batch.logprobs_BT.dtype, batch.versions_BT.dtype, batch.advantages_B.dtype) == (np.float32, np.int32, np.float32)


@pytest.mark.parametrize(("logprobs", "versions"), [([-1.0], [0, 0]), ([-1.0, -1.0], [0])])
def test_a_completion_without_one_of_each_a_token_is_refused(logprobs, versions):
    with pytest.raises(RlbridgeError, match="generator"):
        build_batch([[1]], [Completion([2, 3], logprobs, versions, "stop")], np.ones(1), temperature=1.0, pad=0, step=1)
