"""Packing against every other packing: few micro-batches, the same for any order, and nothing cut or lost."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches import MicroBatch, Row, counts, pack
from tests.rows import random_rows

ROWS = st.builds(random_rows, st.integers(0, 1 << 20), st.integers(0, 7))
BUDGETS = st.integers(1, 120)


@cache
def fewest_bins(sizes: tuple[int, ...], room: tuple[int, ...], budget: int) -> int:
    """Tries every bin for the first size, a new one too. `room`: what is left in each bin so far."""
    if not sizes:
        return len(room)
    first, *rest = sizes
    best = fewest_bins(tuple(rest), tuple(sorted((*room, max(0, budget - first)))), budget)
    for place, left in enumerate(room):
        if first <= left:
            others = tuple(sorted((*room[:place], left - first, *room[place + 1 :])))
            best = min(best, fewest_bins(tuple(rest), others, budget))
    return best


def trained(rows: list[Row]) -> list[Row]:
    return [row for row in rows if len(row.kept)]


def sequences(batch: MicroBatch) -> list[tuple[int, ...]]:
    return [tuple(batch.input_ids[0, start:end].tolist()) for start, end in pairwise(batch.cuts)]


@settings(max_examples=100)
@given(rows=ROWS, budget=BUDGETS)
def test_sequences_are_packed_whole_and_nearly_as_tightly_as_can_be(rows: list[Row], budget: int) -> None:
    """First-fit decreasing needs at most 11/9 of the fewest bins and 6/9 more (Dosa 2007)."""
    batches = pack(rows, budget)
    wanted = [(*row.prompt_tokens.tolist(), *row.completion_tokens.tolist()[:-1]) for row in trained(rows)]
    assert sorted(one for batch in batches for one in sequences(batch)) == sorted(wanted)
    assert all(batch.cuts[-1] <= budget or len(batch.cuts) == 2 for batch in batches)
    fewest = fewest_bins(tuple(sorted((len(one) for one in wanted), reverse=True)), (), budget)
    assert fewest <= len(batches) <= (11 * fewest + 6) // 9


@settings(max_examples=100)
@given(rows=ROWS, budget=BUDGETS, shuffled=st.randoms(use_true_random=False))
def test_the_number_of_micro_batches_does_not_depend_on_the_order_of_rows(
    rows: list[Row], budget: int, shuffled: random.Random
) -> None:
    before = [batch.cuts for batch in pack(rows, budget)]
    others = list(rows)
    shuffled.shuffle(others)
    assert [batch.cuts for batch in pack(others, budget)] == before


@settings(max_examples=60)
@given(rows=ROWS, budget=BUDGETS, num_ranks=st.integers(1, 4))
def test_what_the_ranks_train_adds_up_to_the_batch(rows: list[Row], budget: int, num_ranks: int) -> None:
    """Totals and targets of the ranks' parts are those of all rows on one rank, and of a plain count."""
    parts = [rows[rank::num_ranks] for rank in range(num_ranks)]
    packed = [batch for part in parts for batch in pack(part, budget)]
    totals = [counts(part) for part in parts]
    usable = [np.isfinite(row.behavior_logprobs) for row in rows]
    wanted = {
        "tokens": sum(sum(map(bool, row.in_loss & good)) for row, good in zip(rows, usable, strict=True)),
        "sequences": sum(any(row.in_loss & good) for row, good in zip(rows, usable, strict=True)),
        "missing_logprobs": sum(sum(map(bool, row.in_loss & ~good)) for row, good in zip(rows, usable, strict=True)),
    }
    for name, number in wanted.items():
        assert sum(total[name] for total in totals) == counts(rows)[name] == number
    assert sum(len(batch.targets) for batch in packed) == wanted["tokens"]
    assert sum(len(batch.cuts) - 1 for batch in packed) == wanted["sequences"]
