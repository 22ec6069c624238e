"""The curves of a batch, each derived a second time by slow loops over single tokens and samples."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from learner.curves import batch_maxima, batch_sums, reward_curves, token_curves
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan

STEP, BOUND = 9, 2


def completion(rng: np.random.Generator) -> Completion:
    """Up to four spans of ascending versions, the oldest older than the bound allows."""
    versions = sorted(rng.choice(np.arange(STEP - BOUND - 3, STEP + 1), size=int(rng.integers(1, 5)), replace=False))
    spans, end = [], 0
    for version in versions:
        start, end = end, end + int(rng.integers(1, 9))
        spans.append(VersionSpan(int(version), start, end))
    reason = FinishReason.LENGTH if rng.random() < 0.3 else FinishReason.STOP
    return Completion(np.ones(end, np.int32), np.zeros(end, np.float32), tuple(spans), reason)


def share(seed: int, num_items: int, rewards: np.ndarray | None = None) -> Share:
    rng = np.random.default_rng(seed)
    items = tuple(ShareItem(0, 0, i, np.ones(3, np.int32), completion(rng)) for i in range(num_items))
    table = np.zeros((1, 1), np.float32) if rewards is None else rewards.astype(np.float32)
    return Share(1, STEP, b"", 0, 1, 0, table, table, items)


def ages(batch: Share) -> list[int]:
    """Staleness of every single token."""
    return [
        STEP - span.version
        for item in batch.items
        for span in item.completion.spans
        for _ in range(span.start, span.end)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_token_curves_count_every_token_once(seed: int) -> None:
    batch = share(seed, 20)
    curves = token_curves(batch_sums(batch, BOUND))
    every = ages(batch)
    lengths = [len(item.completion.tokens) for item in batch.items]
    assert curves["completion/count"] == 20
    assert curves["completion/length_mean"] == pytest.approx(statistics.fmean(lengths))
    assert curves["completion/truncated_frac"] == pytest.approx(
        sum(item.completion.finish_reason is FinishReason.LENGTH for item in batch.items) / 20
    )
    assert curves["staleness/mean"] == pytest.approx(statistics.fmean(every))
    assert curves["staleness/left_out_frac"] == pytest.approx(sum(age > BOUND for age in every) / len(every))
    assert 0 < curves["staleness/left_out_frac"] < 1


def test_a_token_at_the_bound_is_in_the_loss() -> None:
    batch = share(0, 20)
    oldest = max(ages(batch))
    assert batch_sums(batch, oldest)["left_out"] == 0
    assert batch_sums(batch, oldest - 1)["left_out"] == ages(batch).count(oldest)


def test_sums_of_ranks_give_the_curves_of_the_whole_batch() -> None:
    first, second, both = share(1, 4), share(2, 7), share(1, 4)
    both = Share(1, STEP, b"", 0, 1, 0, both.rewards, both.rewards, first.items + second.items)
    parts = [batch_sums(part, BOUND) for part in (first, second)]
    added = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert token_curves(added) == token_curves(batch_sums(both, BOUND))


@pytest.mark.parametrize("seed", range(5))
def test_maxima_are_of_the_longest_completion_and_the_oldest_token(seed: int) -> None:
    batch = share(seed, 20)
    maxima = batch_maxima(batch)
    assert maxima["completion/length_max"] == max(len(item.completion.tokens) for item in batch.items)
    assert maxima["staleness/max"] == max(ages(batch))


def test_a_rank_without_completions_adds_nothing() -> None:
    empty = share(0, 0)
    assert set(batch_sums(empty, BOUND).values()) == {0.0}
    assert set(batch_maxima(empty).values()) == {0.0}
    assert set(token_curves(batch_sums(empty, BOUND)).values()) == {0.0}


def slow_reward_curves(table: np.ndarray) -> tuple[float, float, float]:
    values, deviations, equal, groups = [], [], 0, 0
    for row in table.tolist():
        group = [value for value in row if not math.isnan(value)]
        if not group:
            continue
        groups += 1
        values += group
        deviations.append(statistics.stdev(group) if len(group) > 1 else 0.0)
        equal += len(set(group)) == 1
    return statistics.fmean(values), statistics.fmean(deviations), equal / groups


@pytest.mark.parametrize("seed", range(5))
def test_reward_curves_leave_out_missing_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2, (12, 4)).astype(np.float32)
    table[rng.random((12, 4)) < 0.2] = np.nan
    table[0], table[1] = np.nan, 1.0
    table[2] = [0.5, np.nan, np.nan, np.nan]
    curves = reward_curves(share(0, 0, table))
    mean, deviation, equal = slow_reward_curves(table)
    assert curves["reward/mean"] == pytest.approx(mean, rel=1e-6)
    assert curves["reward/std"] == pytest.approx(deviation, rel=1e-5)
    assert curves["reward/equal_group_frac"] == pytest.approx(equal)


def test_a_batch_without_any_reward_has_curves_without_nan() -> None:
    curves = reward_curves(share(0, 0, np.full((3, 4), np.nan)))
    assert curves == {"reward/mean": 0.0, "reward/std": 0.0, "reward/equal_group_frac": 1.0}
