"""The notebook's five functions, held to what it says and to how its patterns really behave."""

from __future__ import annotations

import pytest

from actors.rewards.xml import xml_correctness, xml_count, xml_int, xml_soft_format, xml_strict_format

PERFECT = "<reasoning>\n48/2=24\n</reasoning>\n<answer>\n72\n</answer>\n"
ANSWER = "48/2=24\n#### 72"


def test_a_perfect_text_counts_a_half() -> None:
    assert xml_count(PERFECT) == 0.5


def test_without_its_final_newline_the_whole_text_is_taken_off() -> None:
    text = PERFECT.removesuffix("\n")
    assert xml_count(text) == pytest.approx(0.5 - 0.001 * len(text) + 0.001)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0.0),
        ("<reasoning>\n", 0.125),
        ("<reasoning>\n<reasoning>\n", 0.0),  # exactly one
        ("a\n</reasoning>\nb", 0.125),
        (PERFECT + "four", 0.5 - 0.004 - 0.004),
    ],
)
def test_each_tag_counts_an_eighth_if_it_is_there_once(text: str, count: float) -> None:
    assert xml_count(text) == pytest.approx(count)


@pytest.mark.parametrize(
    ("text", "strict", "soft"),
    [
        (PERFECT, 0.5, 0.0),
        (PERFECT.removesuffix("\n"), 0.0, 0.0),
        (PERFECT + "x", 0.0, 0.0),
        (PERFECT.replace("48", "4\n8"), 0.0, 0.0),  # two lines of reasoning
        ("<reasoning>a</reasoning>\n<answer>b</answer> and more", 0.0, 0.5),
        (" <reasoning>a</reasoning><answer>b</answer>", 0.0, 0.0),
    ],
)
def test_no_text_has_both_formats(text: str, strict: float, soft: float) -> None:
    assert (xml_strict_format(text), xml_soft_format(text)) == (strict, soft)


@pytest.mark.parametrize(("answer", "score"), [("72", 0.5), (" 72\n", 0.5), ("1,080", 0.0), ("-7", 0.0), ("7.5", 0.0)])
def test_an_integer_is_digits_alone(answer: str, score: float) -> None:
    assert xml_int(f"<answer>{answer}</answer>") == score


def test_the_last_answer_is_compared_as_text() -> None:
    assert xml_correctness(PERFECT, ANSWER) == xml_correctness(PERFECT, "72") == 2.0
    assert xml_correctness("<answer>1</answer><answer>72</answer>", ANSWER) == 2.0
    assert xml_correctness("72", ANSWER) == 2.0  # a text without tags is its own answer
    assert xml_correctness("<answer>1080</answer>", "#### 1,080") == 0.0
    assert xml_correctness("<answer>1,080</answer>", "#### 1,080") == 2.0
