"""Rewards of form and length: formats, cosine, over-long answers, repetition."""

from __future__ import annotations

import math

import pytest

from actors.rewards.cosine import cosine, cosine_swift
from actors.rewards.formats import think_answer_format, think_format
from actors.rewards.lengths import length, soft_overlong, soft_overlong_swift
from actors.rewards.repetition import repetition, repetition_tokens

RIGHT, WRONG = r"\boxed{1}", r"\boxed{2}"


@pytest.mark.parametrize(
    ("text", "thinks", "answers"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        ("<think>a\nb</think>\n\n<answer>\nc\n</answer>", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 1.0),
        ("<think>a</think><answer>b</answer>\n", 1.0, 0.0),  # one character too many
        (" <think>a</think><answer>b</answer>", 0.0, 0.0),
        ("<think>a</think> so <answer>b</answer>", 1.0, 0.0),
        ("<think>a</think>b", 1.0, 0.0),
        ("<think>a<think>b</think>c", 0.0, 0.0),
        ("<think>a", 0.0, 0.0),
        ("<answer>b</answer>", 0.0, 0.0),
    ],
)
def test_each_format_accepts_what_its_library_accepts(text: str, thinks: float, answers: float) -> None:
    assert (think_format(text), think_answer_format(text)) == (thinks, answers)


@pytest.mark.parametrize(
    ("share", "trl", "swift"),
    [
        (0.0, (1.0, -1.0), (1.0, -0.5)),
        (0.5, (0.75, -0.75), (0.75, -0.25)),
        (1.0, (0.5, -0.5), (0.5, 0.0)),
        (1.5, (0.5, -0.5), (0.75, -0.25)),  # TRL's stays, ms-swift's comes back
        (2.0, (0.5, -0.5), (1.0, -0.5)),
    ],
)
def test_the_cosine_goes_from_short_to_long(share: float, trl: tuple[float, float], swift: tuple[float, float]) -> None:
    tokens = [7] * int(100 * share)
    assert (cosine(RIGHT, "1", tokens, 100), cosine(WRONG, "1", tokens, 100)) == pytest.approx(trl)
    assert (cosine_swift(RIGHT, "1", tokens, 100), cosine_swift(WRONG, "1", tokens, 100)) == pytest.approx(swift)


def test_the_cosine_is_a_cosine_between_its_ends() -> None:
    value = cosine(RIGHT, "1", [7] * 30, 120, correct_short=2.0, correct_long=-1.0)
    assert value == pytest.approx(2.0 - 3.0 * (1.0 - math.cos(math.pi / 4)) / 2.0)


def test_without_a_readable_reference_length_is_no_opinion_either() -> None:
    assert cosine(RIGHT, "a lot", [7], 10) is cosine_swift(RIGHT, "a lot", [7], 10) is None


@pytest.mark.parametrize(
    ("num_tokens", "clamped", "falling"),
    [(0, 0.0, 0.0), (80, 0.0, 0.0), (90, -0.5, -0.5), (100, -1.0, -1.0), (140, -1.0, -3.0)],
)
def test_a_buffer_before_the_limit_costs_up_to_one(num_tokens: int, clamped: float, falling: float) -> None:
    tokens = [7] * num_tokens
    assert soft_overlong("", tokens, max_tokens=100, buffer_tokens=20) == clamped
    assert soft_overlong_swift("", tokens, max_tokens=100, buffer_tokens=20) == falling


@pytest.mark.parametrize("buffer", [0, 100])
def test_a_buffer_that_is_none_or_everything_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"expected buffer_tokens between 1 and 99, below max_tokens, got {buffer}"):
        soft_overlong("", [7], max_tokens=100, buffer_tokens=buffer)


def test_length_is_whether_there_is_more_than_so_much_text() -> None:
    assert [length("x" * size) for size in (1024, 1025)] == [0.0, 1.0]
    assert length("abc", characters=2) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("a b", 0.0),  # no 3-gram
        ("a b c d", 0.0),
        ("a b c A B C", -0.25),  # four 3-grams, of which abc twice
        ("a a a a a", -2 / 3),
    ],
)
def test_repeated_words_cost_their_share_of_the_ngrams(text: str, reward: float) -> None:
    assert repetition(text) == pytest.approx(reward)
    assert math.copysign(1.0, repetition(text)) == (1.0 if reward == 0.0 else -1.0)


def test_repeated_tokens_cost_their_share_of_the_ngrams() -> None:
    assert repetition_tokens("", [5, 5, 5, 5, 5], ngram=2) == -0.75
    assert repetition_tokens("", [1, 2, 3, 4], ngram=2) == repetition_tokens("", [1], ngram=2) == 0.0
    assert repetition_tokens("", [5, 5, 5], ngram=1, penalty=-0.3) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="expected an ngram of at least 1, got 0"):
        repetition_tokens("", [5], ngram=0)
