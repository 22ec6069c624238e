"""mean@k, pass@j and maj@k against slow derivations, and what becomes of completions that failed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.report import accuracy
from broker.scores import (
    ALL,
    Scored,
    Z,
    chance_of_one,
    interval,
    majority_is_right,
    pass_at,
    score,
    score_table,
)
from protocol.types import Trajectory

RIGHT, WRONG = Scored(1.0), Scored(0.1)  # 0.1 is for the format, and no answer


def trajectory(prompt: int, sample: int, answer: str = "", **rewards: float | None) -> Trajectory:
    return Trajectory(prompt, 0, sample, None, rewards=rewards, answers={"strict": answer} if answer else {})


def by_subsets(rights: list[bool], j: int) -> Fraction:
    """Over every choice of j completions."""
    subsets = list(itertools.combinations(rights, j))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_j_is_the_share_of_subsets_with_a_right_completion(rights: list[bool], data: st.DataObject) -> None:
    j = data.draw(st.integers(1, len(rights)))
    assert chance_of_one(len(rights), sum(rights), j) == pytest.approx(float(by_subsets(rights, j)), abs=1e-12)


def test_pass_at_is_given_for_powers_of_two_and_k_over_the_prompts_that_have_so_many() -> None:
    full, short = [RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG], [WRONG, RIGHT]
    found = pass_at([full, short], k=6)
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6"]
    assert found["pass@1"] == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert found["pass@2"] == pytest.approx((2 / 6 + 1) / 2)
    assert found["pass@4"] == pytest.approx(4 / 6), "the short prompt has no four completions"
    assert "pass@4" not in pass_at([short], k=4)


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans()), min_size=1, max_size=8))
def test_a_majority_is_the_most_frequent_answer_and_the_first_of_those_as_frequent(
    given_answers: list[tuple[str | None, bool]],
) -> None:
    prompt = [Scored(float(right), answer) for answer, right in given_answers]
    answers = [answer for answer, _ in given_answers if answer is not None]
    expected = False
    if answers:
        most = max(answers.count(answer) for answer in answers)
        winner = next(answer for answer in answers if answers.count(answer) == most)
        expected = next(right for answer, right in given_answers if answer == winner)
    assert majority_is_right(prompt) == expected


def test_a_majority_can_be_wrong_where_the_mean_is_not_nothing_and_the_other_way_round() -> None:
    split = [Scored(1.0, "8"), Scored(0.0, "9"), Scored(0.0, "9"), Scored(0.0)]
    agreed = [Scored(1.0, "8"), Scored(1.0, "8"), Scored(0.0, "9"), Scored(0.0, "7"), Scored(0.0, "6")]
    found = score([split, agreed], k=5)
    assert found["metrics"]["maj@5"] == 0.5
    assert found["metrics"]["mean@5"] == pytest.approx((1 / 4 + 2 / 5) / 2)


def test_without_answers_there_is_no_majority_and_with_one_completion_neither_that_nor_pass() -> None:
    assert "maj@2" not in score([[RIGHT, WRONG]], k=2)["metrics"]
    assert list(score([[Scored(1.0, "8")]], k=1)["metrics"]) == ["mean@1"]


def test_only_a_full_mark_is_right_but_the_value_counts_all() -> None:
    found = score([[WRONG], [RIGHT], [Scored(2.0)], [Scored(-1.0)]], k=1)
    assert found["metrics"] == {"mean@1": 0.5}
    assert found["value"] == pytest.approx((0.1 + 1 + 2 - 1) / 4)
    assert (found["prompts"], found["completions"]) == (4, 4)


def test_what_failed_or_has_no_opinion_is_in_no_number_and_never_a_zero() -> None:
    good = [trajectory(0, 0, strict=1.0), trajectory(0, 1, strict=1.0)]
    failed = replace(trajectory(0, 2, strict=0.0, lenient=0.0), error="tokens of another version")
    silent = trajectory(0, 3, strict=None, lenient=1.0)
    lost = [replace(trajectory(1, sample), error="generation failed") for sample in range(4)]
    strict, lenient = score_table([("a", [*good, failed, silent]), ("a", lost)], ["strict", "lenient"])[:2]
    assert (strict["prompts"], strict["completions"], strict["metrics"]["mean@4"]) == (1, 2, 1.0)
    assert (lenient["prompts"], lenient["completions"], lenient["metrics"]["mean@4"]) == (1, 1, 1.0)
    assert "pass@4" not in strict["metrics"]


def test_where_nothing_is_scored_there_is_no_number() -> None:
    (row, _) = score_table([("a", [replace(trajectory(0, 0), error="gone")])], ["strict"])
    assert (row["value"], row["low"], row["metrics"]) == (None, None, {})


def test_every_source_has_a_row_for_every_function_behind_those_of_all() -> None:
    groups = [("a", [trajectory(0, 0, strict=1.0, lenient=1.0)]), ("b", [trajectory(1, 0, strict=0.0, lenient=1.0)])]
    rows = score_table(groups, ["strict", "lenient"])
    assert [(row["source"], row["function"], row["metrics"]["mean@1"]) for row in rows] == [
        *((ALL, "strict", 0.5), (ALL, "lenient", 1.0)),
        *(("a", "strict", 1.0), ("a", "lenient", 1.0), ("b", "strict", 0.0), ("b", "lenient", 1.0)),
    ]


def wilson_by_search(mean: float, n: float) -> tuple[float, float]:
    """Where the mean is just not rejected: |mean - p| = z sqrt(p (1 - p) / n), by bisection."""

    def is_rejected(p: float) -> bool:
        return abs(mean - p) > Z * sqrt(p * (1 - p) / n)

    def edge(outside: float) -> float:
        inside = mean
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_rejected(middle) else (middle, outside)
        return inside

    return edge(0.0), edge(1.0)


@given(st.integers(2, 60), st.data())
def test_the_interval_of_one_completion_each_is_wilsons_with_one_less(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    low, high = interval([1.0] * right + [0.0] * (n - right), n)
    expected = wilson_by_search(right / n, n - 1 if 0 < right < n else n)
    assert (low, high) == pytest.approx(expected, abs=1e-9)


def test_completions_that_repeat_each_other_narrow_no_interval_and_independent_ones_do() -> None:
    one_each = interval([1.0] * 5 + [0.0] * 15, 20)
    assert interval([1.0] * 5 + [0.0] * 15, 160) == one_each, "eight equal completions of each prompt"
    low, high = interval([0.25] * 10 + [0.125, 0.375] * 5, 160)
    assert high - low < 0.6 * (one_each[1] - one_each[0])


def test_a_reward_model_has_a_mean_and_decides_no_accuracy() -> None:
    table = [
        {"source": source, "function": function, "metrics": {"mean@2": value}}
        for source, value in (("", 0.5), ("a.jsonl", 0.75))
        for function in ("gsm8k", "reward_model")
    ]
    assert accuracy(table, "gsm8k", 2) == 0.5
    assert accuracy(table, "reward_model", 2) is None
    table[0]["metrics"] = {}
    assert accuracy(table, "gsm8k", 2) is None
