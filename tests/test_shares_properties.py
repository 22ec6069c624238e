"""Shares of batches of every kind against slow second derivations: token by token, and by trying every division."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.shares import balance, batch_digest, cut_shares
from protocol.types import Completion, FinishReason, Group, Prompt, ShareItem, Trajectory, VersionSpan

STEP, BOUND, GROUP_SIZE = 9, 2, 4


@st.composite
def completions(draw: st.DrawFn, oldest: int) -> Completion:
    """Up to 12 tokens of ascending versions, some of them a tool's."""
    versions = draw(st.lists(st.integers(oldest, STEP), min_size=1, max_size=12).map(sorted))
    starts = [n for n, version in enumerate(versions) if n == 0 or versions[n - 1] != version]
    ends = [*starts[1:], len(versions)]
    spans = tuple(VersionSpan(versions[start], start, end) for start, end in zip(starts, ends, strict=True))
    size = len(versions)
    observed = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size).map(np.array))
    return Completion(np.arange(size, dtype=np.int32), np.zeros(size, np.float32), spans, FinishReason.STOP, observed)


@st.composite
def batches(draw: st.DrawFn) -> list[Group]:
    """Up to 5 groups with samples missing; some are remainders, which may be older than the bound."""
    groups = []
    for number in range(draw(st.integers(0, 5))):
        is_remainder = draw(st.booleans())
        samples = draw(st.sets(st.integers(0, GROUP_SIZE - 1), min_size=1).map(sorted))
        oldest = STEP - BOUND - 2 if is_remainder else STEP - BOUND
        trajectories = tuple(
            Trajectory(number, draw(st.integers(1, 3)), sample, draw(completions(oldest)), draw(st.integers(0, 9)) / 4)
            for sample in samples
        )
        baseline = tuple(draw(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=GROUP_SIZE)))
        prompt = Prompt(number, number, np.arange(draw(st.integers(1, 20)), dtype=np.int32))
        groups.append(Group(prompt, oldest, trajectories, baseline if is_remainder else (), is_remainder))
    return groups


def tokens_in_loss(groups: list[Group]) -> Iterator[int]:
    for group in groups:
        for trajectory in group.trajectories:
            completion = trajectory.completion
            assert completion is not None
            for place, token in enumerate(completion.tokens):
                (version,) = (span.version for span in completion.spans if span.start <= place < span.end)
                is_tools = completion.observed is not None and completion.observed[place]
                if STEP - version <= BOUND and not is_tools:
                    yield int(token)


@settings(max_examples=50)
@given(groups=batches(), num_ranks=st.integers(1, 5))
def test_the_shares_of_all_ranks_are_the_batch(groups: list[Group], num_ranks: int) -> None:
    shares = cut_shares(7, STEP, groups, num_ranks, GROUP_SIZE, BOUND)
    assert [(share.epoch, share.step, share.rank, share.num_ranks) for share in shares] == [
        (7, STEP, rank, num_ranks) for rank in range(num_ranks)
    ]
    given_out = {(item.group, item.sample): item for share in shares for item in share.items}
    assert len(given_out) == sum(len(share.items) for share in shares), "a completion is in two shares"
    there = {(row, one.sample): one for row, group in enumerate(groups) for one in group.trajectories}
    assert given_out.keys() == there.keys()
    for (row, sample), item in given_out.items():
        assert item.prompt == groups[row].prompt.number
        assert item.completion is there[row, sample].completion
        assert item.prompt_tokens is groups[row].prompt.tokens


@settings(max_examples=50)
@given(groups=batches(), num_ranks=st.integers(1, 5))
def test_every_rank_knows_the_whole_batch(groups: list[Group], num_ranks: int) -> None:
    nan = float("nan")
    table = [[nan] * GROUP_SIZE for _ in groups]
    baselines = [[nan] * GROUP_SIZE for _ in groups]
    for row, group in enumerate(groups):
        for trajectory in group.trajectories:
            table[row][trajectory.sample] = trajectory.reward
        for column in range(GROUP_SIZE):
            if not group.remainder:
                baselines[row][column] = table[row][column]
            elif column < len(group.baseline_rewards):
                baselines[row][column] = group.baseline_rewards[column]
    shape = (len(groups), GROUP_SIZE)
    for share in cut_shares(7, STEP, groups, num_ranks, GROUP_SIZE, BOUND):
        np.testing.assert_array_equal(share.rewards, np.array(table, np.float32).reshape(shape))
        np.testing.assert_array_equal(share.baseline_rewards, np.array(baselines, np.float32).reshape(shape))
        assert share.total_tokens == len(list(tokens_in_loss(groups)))
        assert share.remainder_groups == {row for row, group in enumerate(groups) if group.remainder}
        assert share.batch_digest == batch_digest(groups)


def item(number: int, num_tokens: int) -> ShareItem:
    completion = Completion(
        np.zeros(num_tokens - 1, np.int32), np.zeros(num_tokens - 1, np.float32), (), FinishReason.STOP
    )
    return ShareItem(number, 0, number, np.zeros(1, np.int32), completion)


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=7), num_ranks=st.integers(1, 3))
def test_no_rank_has_a_third_more_than_the_best_division_would_give_it(sizes: list[int], num_ranks: int) -> None:
    """Graham's bound for longest first: 4/3 - 1/(3 m) of the smallest maximum there is."""
    parts = balance([item(number, size) for number, size in enumerate(sizes)], num_ranks)
    largest = max(sum(sizes[one.group] for one in part) for part in parts)
    best = min(
        max(sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == r) for r in range(num_ranks))
        for ranks in product(range(num_ranks), repeat=len(sizes))
    )
    assert largest * 3 * num_ranks <= best * (4 * num_ranks - 1)
