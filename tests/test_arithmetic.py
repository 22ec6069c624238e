"""The calculator's sums: exact, as GSM8K writes them, and harmless whatever a model writes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rollouts.arithmetic import MAX_CHARACTERS, MAX_DEPTH, NotASum, worked_out


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48/2", "24"),
        ("47*36", "1692"),
        ("2+3*4-1", "13"),
        ("(2+3)*4", "20"),
        ("10-4-3", "3"),
        ("12/4/3", "1"),
        (".5*60", "30"),
        ("1/3", "0.3333"),
        ("2/3", "0.6667"),
        ("-3*-2", "6"),
        ("1-3/2", "-0.5"),
        ("0-1/100000", "0"),
        ("25%*80", "20"),
        ("(10+10)%", "0.2"),
        ("$1,250*2", "2500"),
        (" 3 + 4 ", "7"),
        ("5.", "5"),
    ],
)
def test_a_sum_is_worked_out_as_gsm8k_writes_it(text: str, result: str) -> None:
    assert worked_out(text) == result


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a number is missing"),
        ("3+", "a number is missing"),
        ("3 apples", "no part of a sum: a"),
        ("2**9", r"\* where a number belongs"),
        ("9^9", r"no part of a sum: \^"),
        ("__import__('os')", "no part of a sum: _"),
        ("1/0", "a division by zero"),
        ("1/(2-2)", "a division by zero"),
        ("(1+2", "a bracket is open"),
        ("1+2)", r"\) behind the end"),
        ("1 2", "2 behind the end"),
        ("٣+1", "no part of a sum"),
        ("(" * (MAX_DEPTH + 2) + "1", "brackets too deep"),
        ("-" * (MAX_DEPTH + 2) + "1", "brackets too deep"),
        ("9" * (MAX_CHARACTERS + 1), "more than 120 characters"),
    ],
)
def test_what_is_no_sum_has_no_result(text: str, reason: str) -> None:
    with pytest.raises(NotASum, match=reason):
        worked_out(text)


@given(st.text(alphabet="0123456789.,+-*/()%$ ", max_size=MAX_CHARACTERS))
def test_no_text_does_worse_than_have_no_result_and_no_result_is_longer_than_its_text_by_much(text: str) -> None:
    try:
        result = worked_out(text)
    except NotASum:
        return
    assert len(result) <= len(text) + 6
    assert Fraction(result) is not None


@given(
    st.recursive(
        st.integers(0, 999).map(str),
        lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
            lambda parts: f"({parts[0]}{parts[1]}{parts[2]})"
        ),
        max_leaves=8,
    )
)
def test_whole_numbers_agree_with_pythons_own(text: str) -> None:
    if len(text) <= MAX_CHARACTERS:
        assert worked_out(text) == str(eval(text))
