"""Shares: nothing lost, nothing twice, balanced by tokens, and the same batch for every rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.shares import batch_digest, cut_shares
from protocol.types import Completion, FinishReason, Group, Prompt, Share, Trajectory, VersionSpan


def completion(
    length: int, version: int = 5, observed: list[int] | None = None, first_version: int | None = None
) -> Completion:
    first = version if first_version is None else first_version
    middle = length // 2
    spans = tuple(
        span for span in (VersionSpan(first, 0, middle), VersionSpan(version, middle, length)) if span.end > span.start
    )
    mask = None
    if observed is not None:
        mask = np.zeros(length, np.bool_)
        mask[observed] = True
    tokens = np.arange(length, dtype=np.int32)
    return Completion(tokens, np.zeros(length, np.float32), spans, FinishReason.STOP, mask)


def group(
    number: int, lengths: list[int], samples: list[int] | None = None, attempt: int = 1, **fields: object
) -> Group:
    """A group of completions of these lengths; rewards are 10 * prompt + sample."""
    samples = list(range(len(lengths))) if samples is None else samples
    trajectories = tuple(
        Trajectory(number, attempt, sample, completion(length), float(10 * number + sample))
        for sample, length in zip(samples, lengths, strict=True)
    )
    return Group(Prompt(number, number, np.arange(3, dtype=np.int32)), 5, trajectories, **fields)  # type: ignore[arg-type]


def cut(groups: list[Group], num_ranks: int, group_size: int = 4, max_staleness: int = 0) -> list[Share]:
    return cut_shares(7, 5, groups, num_ranks, group_size, max_staleness)


def load(share: Share) -> int:
    return sum(len(item.prompt_tokens) + len(item.completion.tokens) for item in share.items)


batches = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), min_size=1, max_size=8).map(
    lambda table: [group(number, lengths) for number, lengths in enumerate(table)]
)


@settings(max_examples=100, deadline=None)
@given(groups=batches, num_ranks=st.integers(1, 9))
def test_every_completion_goes_to_exactly_one_rank(groups: list[Group], num_ranks: int) -> None:
    shares = cut(groups, num_ranks)
    given_out = sorted((item.group, item.sample, item.prompt) for share in shares for item in share.items)
    assert given_out == sorted((t.prompt, t.sample, t.prompt) for g in groups for t in g.trajectories)
    assert [share.rank for share in shares] == list(range(num_ranks))


@settings(max_examples=100, deadline=None)
@given(groups=batches, num_ranks=st.integers(1, 9))
def test_no_rank_has_more_than_an_average_and_one_completion(groups: list[Group], num_ranks: int) -> None:
    shares = cut(groups, num_ranks)
    longest = max(3 + len(item.completion.tokens) for share in shares for item in share.items)
    assert max(map(load, shares)) <= sum(map(load, shares)) / num_ranks + longest


@settings(max_examples=50, deadline=None)
@given(groups=batches, num_ranks=st.integers(1, 9))
def test_all_ranks_see_the_same_batch_however_many_they_are(groups: list[Group], num_ranks: int) -> None:
    alone = cut(groups, 1)[0]
    for share in cut(groups, num_ranks):
        assert share.batch_digest == alone.batch_digest
        assert share.total_tokens == alone.total_tokens == sum(len(item.completion.tokens) for item in alone.items)
        np.testing.assert_array_equal(share.rewards, alone.rewards)


def test_the_longest_go_first_to_whom_has_least() -> None:
    shares = cut([group(0, [7, 17, 3, 5])], 2)
    assert [[item.sample for item in share.items] for share in shares] == [[1], [0, 3, 2]]
    assert [load(share) for share in shares] == [20, 24]


def test_more_ranks_than_completions_leave_some_ranks_without() -> None:
    shares = cut([group(0, [5, 6])], 4)
    assert sorted(len(share.items) for share in shares) == [0, 0, 1, 1]


def test_a_missing_sample_is_nan_in_the_reward_table() -> None:
    share = cut([group(3, [5, 5], samples=[1, 3])], 1)[0]
    np.testing.assert_array_equal(share.rewards, np.array([[np.nan, 31, np.nan, 33]], np.float32))
    np.testing.assert_array_equal(share.baseline_rewards, share.rewards)
    assert share.remainder_groups == frozenset()


def test_a_remainder_keeps_the_baseline_of_its_whole_group() -> None:
    groups = [group(1, [5, 5, 5, 5]), group(2, [9], samples=[2], baseline_rewards=(20.0, 21.0, 22.0), remainder=True)]
    share = cut(groups, 1)[0]
    np.testing.assert_array_equal(share.rewards[1], np.array([np.nan, np.nan, 22, np.nan], np.float32))
    np.testing.assert_array_equal(share.baseline_rewards[1], np.array([20, 21, 22, np.nan], np.float32))
    np.testing.assert_array_equal(share.baseline_rewards[0], share.rewards[0])
    assert share.remainder_groups == frozenset({1})


def one(answer: Completion, remainder: bool = False) -> Group:
    prompt = Prompt(0, 0, np.arange(3, dtype=np.int32))
    return Group(prompt, 3, (Trajectory(0, 1, 0, answer, 1.0),), (1.0, 0.0) if remainder else (), remainder)


def test_observed_tokens_are_outside_the_loss() -> None:
    assert cut([one(completion(10, observed=[2, 3, 9]))], 2)[0].total_tokens == 7


def test_tokens_of_a_remainder_beyond_the_bound_are_outside_the_loss() -> None:
    answer = completion(10, version=5, first_version=3, observed=[0, 9])
    assert cut([one(answer, remainder=True)], 1, max_staleness=2)[0].total_tokens == 8, "within the bound"
    assert cut([one(answer, remainder=True)], 1, max_staleness=1)[0].total_tokens == 4


def test_a_token_beyond_the_bound_stops_the_run_anywhere_else() -> None:
    with pytest.raises(AssertionError, match="prompt 0 is too old for step 5"):
        cut([one(completion(10, version=5, first_version=3))], 1, max_staleness=1)


def test_the_digest_does_not_depend_on_the_order_of_groups() -> None:
    groups = [group(number, [4, 5]) for number in range(4)]
    assert batch_digest(groups) == batch_digest(groups[::-1])
    assert len(batch_digest(groups)) == 16


def test_the_digest_depends_on_every_token() -> None:
    answer = completion(6)
    other = replace(answer, tokens=answer.tokens + np.array([0, 0, 1, 0, 0, 0], np.int32))
    assert batch_digest([one(answer)]) != batch_digest([one(other)])


@pytest.mark.parametrize(
    "other",
    [
        group(1, [5, 6]),
        group(0, [5, 6], attempt=2),
        group(0, [5, 7]),
        group(0, [5, 6], samples=[0, 2]),
        group(0, [5]),
        group(0, [6, 5]),
    ],
    ids=["prompt", "attempt", "tokens", "sample", "fewer", "order of lengths"],
)
def test_the_digest_tells_different_batches_apart(other: Group) -> None:
    assert batch_digest([other]) != batch_digest([group(0, [5, 6])])


def test_a_greedy_sample_is_a_reward_and_nothing_that_is_trained() -> None:
    with_greedy = [group(0, [2, 3, 4]), group(1, [5, 6], samples=[0, 1]), group(2, [7], samples=[2])]
    shares = cut_shares(7, 5, with_greedy, 2, group_size=2, max_staleness=0, has_greedy=True)
    for share in shares:
        np.testing.assert_array_equal(share.greedy_rewards, np.float32([2.0, np.nan, 22.0]))
        np.testing.assert_array_equal(share.rewards, np.float32([[0.0, 1.0], [10.0, 11.0], [np.nan, np.nan]]))
        assert share.total_tokens == 2 + 3 + 5 + 6
    assert sorted((item.group, item.sample) for share in shares for item in share.items) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert len(cut(with_greedy[:1], 1)[0].greedy_rewards) == 0


def test_rewards_by_function_stand_beside_their_sum() -> None:
    plain = group(0, [2, 3], samples=[0, 3])
    first, second = plain.trajectories
    spoken = (replace(first, rewards={"a": 1.0, "b": None}), replace(second, rewards={"b": 0.5, "a": 2.0}))
    (share,) = cut_shares(7, 5, [replace(plain, trajectories=spoken)], 1, 4, 0, functions=["a", "b"])
    missing = np.nan
    wanted = np.float32([[[1.0, missing, missing, 2.0]], [[missing, missing, missing, 0.5]]])
    np.testing.assert_array_equal(share.function_rewards, wanted)
    assert cut([plain], 1)[0].function_rewards.size == 0
