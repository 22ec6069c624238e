"""Which rows a batch has, and how it is cut: the same on all ranks, every completion once an epoch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.mini_batches import loss_rows, mini_batch_places
from protocol.types import FinishReason
from tests.batch_shares import STEP, random_share

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 5))


@given(SIZES, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_every_completion_is_trained_once_an_epoch_in_parts_of_equal_size(
    sizes: tuple[int, int], num_updates: int, num_epochs: int, seed: int
) -> None:
    present = np.random.default_rng(seed).random(sizes) < 0.8
    parts = list(mini_batch_places(present, num_updates, num_epochs, (seed, 3)))
    of_epoch = min(num_updates, int(present.sum()))
    assert len(parts) == of_epoch * num_epochs
    for epoch in range(num_epochs):
        own = parts[epoch * of_epoch : (epoch + 1) * of_epoch]
        assert sorted(place for part in own for place in part.tolist()) == np.flatnonzero(present).tolist()
        assert not own or max(map(len, own)) - min(map(len, own)) <= 1


def test_a_group_stays_whole_where_the_groups_can_be_divided() -> None:
    for part in mini_batch_places(np.ones((8, 4), np.bool_), 4, 2, (1, 2)):
        assert len(part) == 8
        assert len({place // 4 for place in part.tolist()}) == 2


def test_each_epoch_step_and_seed_has_an_order_of_its_own() -> None:
    present = np.ones((32, 2), np.bool_)

    def orders(seed: int, step: int) -> list[list[int]]:
        return [part.tolist() for part in mini_batch_places(present, 1, 2, (seed, step))]

    found = [*orders(1, 1), *orders(1, 2), *orders(2, 1)]
    assert len({tuple(order) for order in found}) == len(found) == 6
    assert orders(1, 1) == orders(1, 1)


def test_rows_stand_in_the_order_of_the_share_and_know_their_place() -> None:
    share = random_share(1)
    rows = loss_rows(share, bound=2, without_truncated=False)
    assert [row.place for row in rows] == [item.group * 4 + item.sample for item in share.items]
    for row, item in zip(rows, share.items, strict=True):
        observed = item.completion.observed
        assert row.in_loss.all() if observed is None else (row.in_loss == ~observed).all()


def test_a_completion_that_was_cut_off_is_left_out_where_the_settings_say_so() -> None:
    share = random_share(2)
    reasons = [item.completion.finish_reason for item in share.items]
    assert set(reasons) == set(FinishReason)
    for reason, kept, left in zip(
        reasons, loss_rows(share, 2, False), loss_rows(share, 2, without_truncated=True), strict=True
    ):
        assert kept.in_loss.any()
        assert left.in_loss.any() == (reason is FinishReason.STOP)


def test_a_token_older_than_the_bound_is_left_out_of_a_remainder_and_stops_the_run_elsewhere() -> None:
    share = random_share(3)
    old = next(item for item in share.items if len(item.completion.spans) == 2 and item.completion.observed is None)
    with pytest.raises(AssertionError, match=rf"step {STEP}: a token of version {STEP - 2} is in the loss, S is 1"):
        loss_rows(share, 1, False)
    remainders = replace(share, remainder_groups=frozenset(range(3)))
    rows = loss_rows(remainders, 1, False)
    row = rows[share.items.index(old)]
    assert (row.in_loss == (row.versions == STEP)).all()
    assert not row.in_loss.all()
