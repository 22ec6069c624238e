"""Packing: every token in the loss appears once, in its place, under the budget, whatever the order of things."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batches import MicroBatch, Row, counts, empty_micro_batch, pack, share_rows, spread, token_versions
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan
from tests.rows import random_rows

Seen = tuple[tuple[int, ...], int, float, float, int, float]


def row(prompt: list[int], completion: list[int], **changes: object) -> Row:
    length = len(completion)
    plain = Row(
        prompt_tokens=np.array(prompt, dtype=np.int32),
        completion_tokens=np.array(completion, dtype=np.int32),
        in_loss=np.ones(length, dtype=np.bool_),
        behavior_logprobs=np.arange(length, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
        advantages=np.full(length, 2.0, dtype=np.float32),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_two_sequences_share_a_row_with_positions_that_start_again() -> None:
    (batch,) = pack(
        [row([5, 6], [7, 8, 9]), row([1], [2, 3], advantages=np.array([-1.0, -1.5], dtype=np.float32))], 100
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2]]  # last tokens are targets only
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.cuts == (0, 4, 6)
    assert batch.positions.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [7, 8, 9, 2, 3]
    assert batch.advantages.tolist() == [2.0, 2.0, 2.0, -1.0, -1.5]
    assert (batch.rows, batch.num_sequences, batch.sequence_ids.tolist()) == ((0, 1), 2, [0, 0, 0, 1, 1])
    assert batch.sequence_lengths.tolist() == [3.0, 3.0, 3.0, 2.0, 2.0]
    assert batch.behavior_logprobs.tolist() == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_what_a_tool_said_is_input_but_never_target() -> None:
    (batch,) = pack([row([5], [6, 7, 8], in_loss=np.array([True, False, True]))], 100)
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([0, 2], [6, 8])
    assert batch.sequence_lengths.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("missing", [np.nan, -np.inf])
def test_a_token_without_a_behavior_logprob_is_left_out_and_counted(missing: float) -> None:
    odd = row([5], [6, 7, 8], behavior_logprobs=np.array([0.5, missing, 0.25], dtype=np.float32))
    (batch,) = pack([odd], 100)
    assert batch.targets.tolist() == [6, 8]
    assert batch.behavior_logprobs.tolist() == [0.5, 0.25]
    assert counts([odd, row([1], [2])]) == {"tokens": 3.0, "sequences": 2.0, "missing_logprobs": 1.0}


def test_a_row_without_a_token_in_the_loss_costs_no_forward() -> None:
    silent = row([5], [6, 7], in_loss=np.zeros(2, dtype=np.bool_))
    assert pack([silent, row([5], [])], 100) == []
    assert counts([silent, row([5], [])]) == {"tokens": 0.0, "sequences": 0.0, "missing_logprobs": 0.0}


def test_a_row_longer_than_the_budget_runs_alone() -> None:
    batches = pack([row([1], [2] * 3), row([1], [2] * 50), row([1], [2] * 3)], 10)
    assert [batch.cuts for batch in batches] == [(0, 50), (0, 3, 6)]


def contents(batches: list[MicroBatch]) -> list[Seen]:
    """Every target with all that is known of it, including the tokens before it in its own sequence."""
    seen = []
    for batch in batches:
        for k, place in enumerate(batch.positions.tolist()):
            start = max(cut for cut in batch.cuts if cut <= place)
            context = tuple(batch.input_ids[0, start : place + 1].tolist())
            assert batch.position_ids[0, place].item() == len(context) - 1
            numbers = (batch.behavior_logprobs[k].item(), batch.advantages[k].item(), int(batch.versions[k]))
            seen.append((context, int(batch.targets[k]), *numbers, batch.sequence_lengths[k].item()))
    return sorted(seen)


def wanted_contents(rows: list[Row]) -> list[Seen]:
    seen = []
    for one in rows:
        tokens = [*one.prompt_tokens.tolist(), *one.completion_tokens.tolist()]
        for place in one.kept.tolist():
            end = len(one.prompt_tokens) + place
            numbers = (float(one.behavior_logprobs[place]), float(one.advantages[place]), int(one.versions[place]))
            seen.append((tuple(tokens[:end]), tokens[end], *numbers, float(len(one.kept))))
    return sorted(seen)


@given(st.integers(0, 10_000), st.integers(0, 12), st.integers(1, 200))
def test_every_token_in_the_loss_is_packed_once_with_its_own_context(seed: int, number: int, budget: int) -> None:
    rows = random_rows(seed, number)
    batches = pack(rows, budget)
    assert contents(batches) == wanted_contents(rows)
    for batch in batches:
        assert batch.input_ids.shape[1] == batch.cuts[-1]
        assert batch.cuts[-1] <= budget or len(batch.cuts) == 2


def test_packing_depends_on_the_rows_alone() -> None:
    first, second = pack(random_rows(7, 15), 64), pack(random_rows(7, 15), 64)
    assert len(first) > 1
    assert [batch.input_ids.tolist() for batch in first] == [batch.input_ids.tolist() for batch in second]


@given(st.integers(0, 10_000), st.integers(0, 12), st.integers(1, 200))
def test_what_is_computed_of_packed_tokens_comes_back_to_its_row(seed: int, number: int, budget: int) -> None:
    rows = random_rows(seed, number)
    batches = pack(rows, budget)
    columns = spread(rows, batches, [batch.behavior_logprobs.numpy() for batch in batches])
    for one, column in zip(rows, columns, strict=True):
        wanted = np.where(one.kept_mask, one.behavior_logprobs, np.nan)
        np.testing.assert_array_equal(column, wanted)


def test_what_nobody_computed_is_no_number_and_a_missing_correction_is_1() -> None:
    (batch,) = pack([row([5], [6, 7], advantages=None)], 100)
    assert batch.corrections.tolist() == [1.0, 1.0]
    for name in ("proximal_logprobs", "reference_logprobs", "advantages", "values", "returns"):
        assert getattr(batch, name).isnan().all(), name


def test_an_empty_micro_batch_has_one_input_and_no_target() -> None:
    batch = empty_micro_batch()
    assert (batch.input_ids.numel(), batch.cuts, batch.targets.numel()) == (1, (0, 1), 0)
    assert {batch.targets.dtype, batch.positions.dtype} == {torch.int64}


def share() -> Share:
    rewards = np.array([[1.0, 0.0]], dtype=np.float32)
    items = tuple(
        ShareItem(0, sample, 3, np.array([9, 8], dtype=np.int32), completion)
        for sample, completion in enumerate(
            [
                Completion(
                    np.array([4, 5, 6], dtype=np.int32),
                    np.array([-1.0, -2.0, -3.0], dtype=np.float32),
                    (VersionSpan(2, 0, 1), VersionSpan(4, 1, 3)),
                    FinishReason.STOP,
                ),
                Completion(
                    np.array([7, 7], dtype=np.int32),
                    np.array([-1.0, -1.0], dtype=np.float32),
                    (VersionSpan(4, 0, 2),),
                    FinishReason.STOP,
                    observed=np.array([True, False]),
                ),
            ]
        )
    )
    return Share(1, 4, b"0" * 16, 0, 1, 4, rewards, rewards, items)


def test_a_share_becomes_rows_that_know_their_place_in_the_table() -> None:
    first, second = share_rows(share(), [None, None])
    assert (first.place, second.place) == (0, 1)
    assert first.versions.tolist() == [2, 4, 4] == token_versions(share().items[0].completion).tolist()
    assert second.in_loss.tolist() == [False, True]


def test_tokens_that_the_caller_leaves_out_are_in_no_total() -> None:
    rows = share_rows(share(), [token_versions(share().items[0].completion) < 3, None])
    assert counts(rows) == {"tokens": 3.0, "sequences": 2.0, "missing_logprobs": 0.0}
    assert rows[0].kept.tolist() == [1, 2]
