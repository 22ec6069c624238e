"""Two ranks whose broker is killed at twelve moments: whoever had which part of a share, they train the same batches.

`tests/dying_broker.py` has the moments.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import msgpack
import pytest

from learner.checkpoint import STATE_FILE
from tests.dying_broker import DEATHS, DEATHS_FILE, OnHearing, OnTold
from tests.rank_worlds import World

pytestmark = pytest.mark.timeout(300)  # the first test waits for a whole world of ranks

BACK_AT_WORK_S = 30.0  # from a death to the end of the next step; some 0.6 s on two idle cores
NUM_PROMPTS, SAMPLES, PROMPTS_PER_STEP = 28, 4, 2


def trained(two_ranks: World) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the two ranks saw of each step."""
    first, second = (rank["bereaved"] for rank in two_ranks.seen)
    assert (first["complete"], second["complete"]) == (True, True)
    return list(zip(first["steps"], second["steps"], strict=True))


def deaths(two_ranks: World) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (two_ranks.folder / "bereaved" / DEATHS_FILE).read_text().splitlines()]


def test_the_broker_died_at_every_moment_with_shares_of_several_pages(two_ranks: World) -> None:
    assert [death["step"] for death in deaths(two_ranks)] == [death.step for death in DEATHS]
    assert all(death["num_pages"] == PROMPTS_PER_STEP * SAMPLES for death in deaths(two_ranks))


def test_both_ranks_train_the_same_batches_whenever_the_broker_dies(two_ranks: World) -> None:
    steps = trained(two_ranks)
    for number, (first, second) in enumerate(steps):
        assert first["identity"] == second["identity"]
        assert first["identity"][1] == number
        assert (first["rewards"], first["loss"]) == (second["rewards"], second["loss"])
    assert len(steps) == NUM_PROMPTS // PROMPTS_PER_STEP


def test_nothing_is_trained_twice_and_nothing_is_lost_however_often_the_broker_dies(two_ranks: World) -> None:
    shares = [rank["completions"] for both in trained(two_ranks) for rank in both]
    assert sorted(chain.from_iterable(shares)) == [
        [prompt, sample] for prompt in range(NUM_PROMPTS) for sample in range(SAMPLES)
    ]
    checkpoint = two_ranks.folder / "bereaved" / "checkpoints" / f"step_{NUM_PROMPTS // PROMPTS_PER_STEP}"
    books = msgpack.unpackb(msgpack.unpackb((checkpoint / STATE_FILE).read_bytes())["ledger"])
    assert (books["offered"], books["trained"], books["unsettled"]) == (NUM_PROMPTS, NUM_PROMPTS, [])


def test_a_share_of_a_dead_broker_is_dropped_although_another_batch_is_cut(two_ranks: World) -> None:
    num_other_batches = 0
    for death, moment in zip(deaths(two_ranks), DEATHS, strict=True):
        first, second = trained(two_ranks)[moment.step]
        if isinstance(moment, OnHearing):
            assert first["identity"][0] == death["epoch"], "both ranks had agreed on it"
        elif not isinstance(moment, OnTold):  # which may have been in time or not
            assert first["identity"][0] != death["epoch"]
            prompts = {prompt for prompt, _ in first["completions"] + second["completions"]}
            num_other_batches += prompts != set(death["prompts"])
    assert num_other_batches >= 6


def test_the_ranks_are_back_at_work_soon_after_each_death(two_ranks: World) -> None:
    ends = [first["at"] for first, _ in trained(two_ranks)]
    for death in deaths(two_ranks):
        assert min(end for end in ends if end > death["at"]) - death["at"] < BACK_AT_WORK_S
