"""Pages of a share in any order, twice, or not all of them; and none too large for the wire."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import MAX_ARRAY_BYTES, MAX_ARRAYS, Header, encode
from protocol.errors import ProtocolError
from protocol.shares import PAGE_BYTES, join_pages, split_pages
from tests.test_pages import LENGTHS, assert_equal, share

SEEDS = st.integers(0, 1 << 30)
RANDOM = st.randoms(use_true_random=False)


@settings(max_examples=80)
@given(seed=SEEDS, lengths=LENGTHS, page_bytes=st.integers(1, 600), shuffled=RANDOM, num_twice=st.integers(0, 3))
def test_pages_in_any_order_and_more_than_once_make_the_same_share(
    seed: int, lengths: list[tuple[int, int, bool]], page_bytes: int, shuffled: random.Random, num_twice: int
) -> None:
    expected = share(seed, lengths)
    pages = split_pages(expected, page_bytes)
    came = pages + shuffled.choices(pages, k=num_twice)
    shuffled.shuffle(came)
    assert_equal(join_pages(came, 9, 1, 3), expected)


@settings(max_examples=60)
@given(seed=SEEDS, lengths=LENGTHS.filter(len), page_bytes=st.integers(1, 300), chosen=RANDOM)
def test_a_share_with_a_page_missing_or_of_another_batch_is_none(
    seed: int, lengths: list[tuple[int, int, bool]], page_bytes: int, chosen: random.Random
) -> None:
    pages = split_pages(share(seed, lengths), page_bytes)
    place = chosen.randrange(len(pages))
    without = pages[:place] + pages[place + 1 :]
    said = f"expected {len(pages)} pages, got" if without else "expected the pages of one share, got those of 0"
    with pytest.raises(ProtocolError, match=said):
        join_pages(without, 9, 1, 3)
    for change in ({"batch_digest": b"e" * 16}, {"step": 7}, {"num_pages": len(pages) + 1}):
        with pytest.raises(ProtocolError, match="expected the pages of one share, got those of 2"):
            join_pages([*pages, pages[place].model_copy(update=change)], 9, 1, 3)


@settings(max_examples=80)
@given(seed=SEEDS, lengths=LENGTHS, page_bytes=st.integers(100, 1500))
def test_no_array_of_a_page_takes_more_than_twice_the_bytes_a_page_may_have(
    seed: int, lengths: list[tuple[int, int, bool]], page_bytes: int
) -> None:
    """With pages of half the wire's limit none is over it, whatever the lengths, however often versions change."""
    assert 2 * PAGE_BYTES <= MAX_ARRAY_BYTES
    for page in split_pages(share(seed, lengths), page_bytes):
        tables = [page.rewards.nbytes, page.baseline_rewards.nbytes, page.remainder_groups.nbytes]
        sizes = sorted(len(frame) for frame in encode(page, Header(9, 1, 1))[2:])
        for size in tables:
            sizes.remove(size)
        assert len(sizes) <= MAX_ARRAYS
        assert sizes[-1] <= 2 * page_bytes or len(page.groups) == 1
