"""Shares as pages: what goes in comes out, no page is larger than allowed, and contradictions are refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Header, decode, encode
from protocol.errors import ProtocolError
from protocol.messages import SharePage
from protocol.shares import join_pages, split_pages
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan

GROUPS, SAMPLES = 5, 4


def completion(rng: np.random.Generator, length: int, observed: bool) -> Completion:
    cuts = sorted({0, length, *rng.integers(0, length + 1, 3).tolist()})
    spans = tuple(VersionSpan(6 + i, start, end) for i, (start, end) in enumerate(itertools.pairwise(cuts)))
    marks = rng.random(length) < 0.5
    marks[0] = True
    return Completion(
        rng.integers(0, 1 << 30, length).astype(np.int32),
        np.where(rng.random(length) < 0.1, np.nan, -rng.random(length)).astype(np.float32),
        spans,
        FinishReason.LENGTH if rng.random() < 0.5 else FinishReason.STOP,
        marks if observed else None,
    )


def share(seed: int, lengths: list[tuple[int, int, bool]]) -> Share:
    """One item for each (prompt tokens, completion tokens, whether a tool has spoken)."""
    rng = np.random.default_rng(seed)
    items = tuple(
        ShareItem(
            group=int(rng.integers(GROUPS)),
            sample=int(rng.integers(SAMPLES)),
            prompt=int(rng.integers(1 << 62)),
            prompt_tokens=rng.integers(0, 1 << 30, prompt).astype(np.int32),
            completion=completion(rng, length, observed),
        )
        for prompt, length, observed in lengths
    )
    rewards = rng.random((GROUPS, SAMPLES)).astype(np.float32)
    rewards[0, 0] = np.nan
    baselines = rng.random((GROUPS, SAMPLES)).astype(np.float32)
    by_function = rng.random((2, GROUPS, SAMPLES)).astype(np.float32)
    greedy = rng.random(GROUPS).astype(np.float32)
    return Share(9, 8, b"d" * 16, 1, 3, 77, rewards, baselines, items, frozenset({0, 3}), by_function, greedy)


def num_bytes(page: SharePage) -> int:
    return 4 * len(page.prompt_tokens) + 9 * len(page.tokens)


def assert_equal(found: Share, expected: Share) -> None:
    for name in ("epoch", "step", "batch_digest", "rank", "num_ranks", "total_tokens", "remainder_groups"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("rewards", "baseline_rewards", "function_rewards", "greedy_rewards"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(found.items) == len(expected.items)
    for ours, theirs in zip(found.items, expected.items, strict=True):
        assert (ours.group, ours.sample, ours.prompt) == (theirs.group, theirs.sample, theirs.prompt)
        np.testing.assert_array_equal(ours.prompt_tokens, theirs.prompt_tokens)
        mine, other = ours.completion, theirs.completion
        assert (mine.spans, mine.finish_reason) == (other.spans, other.finish_reason)
        np.testing.assert_array_equal(mine.tokens, other.tokens)
        np.testing.assert_array_equal(mine.behavior_logprobs, other.behavior_logprobs)
        np.testing.assert_array_equal(mine.observed, other.observed)


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60), st.booleans()), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), LENGTHS, st.integers(1, 1500))
def test_a_share_survives_its_pages_and_the_wire(
    seed: int, lengths: list[tuple[int, int, bool]], page_bytes: int
) -> None:
    expected = share(seed, lengths)
    pages = split_pages(expected, page_bytes)
    sent = [decode([bytes(frame) for frame in encode(page, Header(9, 1, 1))]).message for page in pages]
    assert [page.page for page in pages] == list(range(pages[0].num_pages))
    assert_equal(join_pages([page for page in sent if isinstance(page, SharePage)], 9, 1, 3), expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), LENGTHS, st.integers(1, 1500))
def test_a_page_is_full_and_no_larger_than_allowed(
    seed: int, lengths: list[tuple[int, int, bool]], page_bytes: int
) -> None:
    """A completion that is larger than a page gets one to itself."""
    pages = split_pages(share(seed, lengths), page_bytes)
    assert all(num_bytes(page) <= page_bytes or len(page.groups) == 1 for page in pages)
    for page, following in itertools.pairwise(pages):
        first = 4 * int(following.prompt_lengths[0]) + 9 * int(following.lengths[0])
        assert num_bytes(page) + first > page_bytes


def test_an_empty_share_is_one_page_with_the_reward_table() -> None:
    pages = split_pages(share(1, []))
    assert len(pages) == 1
    assert pages[0].rewards.shape == (GROUPS, SAMPLES)
    assert join_pages(pages, 9, 1, 3).items == ()


def test_tables_travel_with_the_first_page_alone() -> None:
    pages = split_pages(share(1, [(3, 40, False)] * 4), page_bytes=400)
    assert len(pages) == 4
    assert [page.rewards.size for page in pages] == [GROUPS * SAMPLES, 0, 0, 0]
    assert [len(page.remainder_groups) for page in pages] == [2, 0, 0, 0]
    assert [page.function_rewards.size for page in pages] == [2 * GROUPS * SAMPLES, 0, 0, 0]
    assert [len(page.greedy_rewards) for page in pages] == [GROUPS, 0, 0, 0]


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lengths", ints(5, 6), "lengths add up to 11, the array has 12"),
        ("lengths", ints(13, -1), "a length of -1"),
        ("lengths", ints(12), "they describe \\[1, 2\\] completions"),
        ("prompt_lengths", ints(3, 3, 0), "they describe \\[2, 3\\] completions"),
        ("span_counts", ints(1, 1), "lengths add up to 2"),
        ("spans", ints(6, 0), "cannot reshape"),
        ("groups", ints(0), "they describe \\[1, 2\\] completions"),
        ("groups", ints(0, GROUPS), "group 5, sample . of a reward table of 5 by 4"),
        ("samples", ints(-1, 0), "sample -1 of a reward table"),
        ("samples", ints(0, 1, 2), "they describe \\[2, 3\\] completions"),
        ("prompts", np.zeros(3, np.int64), "they describe \\[2, 3\\] completions"),
        ("truncated", np.zeros(1, np.bool_), "they describe \\[1, 2\\] completions"),
        ("tokens", ints(*range(11)), "lengths add up to 12, the array has 11"),
        ("behavior_logprobs", np.zeros(13, np.float32), "lengths add up to 12, the array has 13"),
        ("observed", np.zeros(0, np.bool_), "lengths add up to 12, the array has 0"),
        ("prompt_tokens", ints(1), "lengths add up to 6, the array has 1"),
        ("baseline_rewards", np.zeros((1, 1), np.float32), "reward tables of"),
        ("function_rewards", np.zeros((2, GROUPS, 1), np.float32), "reward tables of .* by function"),
        ("greedy_rewards", np.zeros(GROUPS - 1, np.float32), "4 greedy rewards of 5 groups"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(field: str, value: Any, said: str) -> None:
    (page,) = split_pages(share(3, [(3, 6, True), (3, 6, False)]))
    with pytest.raises(ProtocolError, match=f"the arrays of step 8's share contradict each other: .*{said}"):
        join_pages([page.model_copy(update={field: value})], 9, 1, 3)
