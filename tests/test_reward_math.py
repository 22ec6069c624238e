"""Rewards for mathematical answers: what math-verify is asked in TRL's and ms-swift's way, and DAPO's text rules."""

from __future__ import annotations

import threading

import pytest

from actors.rewards.math_accuracy import math_accuracy, math_accuracy_reasoning, math_accuracy_swift
from actors.rewards.math_dapo import last_box, math_dapo, normalised


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", 1.0),
        (r"so \boxed{0.5}", 1.0),
        ("the answer is $1/2$", 1.0),
        ("so $1/2$", 0.0),  # LaTeX, but neither boxed nor said to be the answer
        (r"the answer is $3$, or rather \boxed{\frac{2}{4}}", 1.0),  # a box is looked at before anything else
        (r"\boxed{\frac{1}{3}}", 0.0),
        ("the answer is 0.5", 0.0),  # no LaTeX
        ("", 0.0),
    ],
)
def test_latex_that_equals_the_reference_is_right(completion: str, score: float) -> None:
    assert math_accuracy(completion, r"$\frac{1}{2}$") == score
    assert math_accuracy_swift(completion, r"$\frac{1}{2}$") == score


def test_a_reference_may_be_a_number_or_a_whole_solution() -> None:
    assert math_accuracy(r"\boxed{6}", "to find the total: $4.00 + $2.00 = $<<4+2=6.00>>6.00\n#### 6") == 1.0
    assert math_accuracy(r"\boxed{72}", 72) == math_accuracy(r"\boxed{72}", "48+24=72\n#### 72") == 1.0


def test_a_reference_that_cannot_be_read_is_no_reason_for_an_opinion() -> None:
    assert math_accuracy(r"\boxed{1}", "a lot") is math_accuracy_swift(r"\boxed{1}", "a lot") is None
    assert math_accuracy_swift(r"\boxed{1}", "a lot", unreadable=0.0) == 0.0


def test_a_reference_that_nothing_can_be_compared_with_is_an_error_and_no_zero() -> None:
    for accuracy in (math_accuracy, math_accuracy_swift):
        with pytest.raises(ValueError, match="Can't evaluate nan or zoo"):
            accuracy(r"\boxed{\text{a}}", "$1/0$")
        assert accuracy(r"\boxed{1/0}", "$1$") == 0.0


def test_behind_the_reasoning_only_what_follows_its_last_end_counts() -> None:
    assert math_accuracy_reasoning(r"<think>\boxed{2}</think> \boxed{1}", "1") == 1.0
    assert math_accuracy_reasoning(r"<think>\boxed{1}</think> then </think> \boxed{2}", "1") == 0.0
    assert math_accuracy_reasoning(r"<think>\boxed{1}", "1") == 0.0
    assert (
        math_accuracy_reasoning(r"\boxed{1}", "a lot") == 0.0
    )  # unfinished reasoning is wrong before it is unreadable


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<answer>72</answer>", 1.0),
        (r"<answer>\boxed{72}</answer>", 1.0),
        ("<answer>\n72 dollars\n</answer>", 1.0),
        (r"<answer>71</answer> \boxed{72}", 0.0),
        ("72", 0.0),
    ],
)
def test_in_an_answers_tags_a_plain_number_will_do(completion: str, score: float) -> None:
    assert math_accuracy_swift(completion, "<think>x</think><answer>72</answer>") == score


def test_no_signal_is_used_so_any_thread_may_ask() -> None:
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(math_accuracy(r"\boxed{1}", "1")))
    thread.start()
    thread.join(30)
    assert found == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("Answer: 34", "34", 1.0),
        ("answer : $34$", "34", 1.0),
        ("Answer: 35\nAnswer: 34", "34", 1.0),  # the last line counts
        ("Answer: 34\nAnswer: 35", "34", -1.0),
        ("Answer: x = 1,034 dollars", "1034", 1.0),
        ("Answer: \\frac12", "\\frac{1}{2}", 1.0),
        ("Answer: 0.5", "\\frac{1}{2}", -1.0),  # text, not mathematics
        ("34", "34", -1.0),
        ("Answer: 34" + "x" * 300, "34", -1.0),
        ("Answer: 34\n" + "x" * 289, "34", 1.0),  # 300 characters, all looked at
        ("Answer: 34\n" + "x" * 290, "34", -1.0),  # the A is out of sight
    ],
)
def test_dapos_rule_wants_an_answer_line_that_reads_the_same(completion: str, answer: str, score: float) -> None:
    assert math_dapo(completion, answer) == score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("x = 5", "5"),
        ("$5$ and $6$", "5"),
        ("\\text{blue}", "blue"),
        ("\\textbf{A} or \\overline{B}", "AorB"),
        ("\\boxed{7}", "7"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\frac1b", "\\frac{1}{b}"),
        ("90^\\circ", "90"),
        ("12 square feet", "12"),
        ("1{,}000", "1000"),
        ("1,000.5", "1,000.5"),  # commas go only where digits are all there is
        ("10\\%", "10\\%"),
        ("3 \\mbox{ cm}", "3"),
    ],
)
def test_answers_are_normalised_as_minervas_are(text: str, normal: str) -> None:
    assert normalised(text) == normal


def test_in_a_strict_box_the_text_itself_counts() -> None:
    assert math_dapo("so \\boxed{1,000}", "1,000", strict_box=True) == 1.0
    assert math_dapo("so \\boxed{1,000}", "1000", strict_box=True) == -1.0
    assert math_dapo("Answer: 5", "5", strict_box=True) == -1.0
    assert math_dapo("\\boxed{5}" + "x" * 92, "5", strict_box=True) == -1.0  # of the last 100 characters


def test_the_last_box_is_found_with_its_braces_balanced() -> None:
    assert last_box("\\boxed{1} \\boxed{\\frac{a}{b}} end") == "\\frac{a}{b}"
    assert last_box("\\boxed{1") is last_box("none") is None
