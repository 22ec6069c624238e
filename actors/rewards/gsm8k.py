"""GSM8K: does the number after `####` equal the reference answer's?

Runs in a reward worker. The rules are those of verl's scorer, so that numbers can be compared with published ones:
only the last 300 characters are looked at, the last match counts, and numbers are compared as text.
"""

from __future__ import annotations

import re

LOOKED_AT_CHARACTERS = 300
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(\-?[0-9\.\,]+)")


def gsm8k(completion: str, answer: str | float, format_score: float = 0.0) -> float:
    """1 for the reference number after `#### `, `format_score` for another number there, 0 for none."""
    found = marked_number(completion)
    if found is None:
        return 0.0
    return 1.0 if found == reference(answer) else format_score


def gsm8k_flexible(completion: str, answer: str | float, format_score: float = 0.0) -> float:
    """As `gsm8k`, for the last number of the text, wherever it stands; its commas and dots are kept, as in verl."""
    found = last_number(completion)
    if found is None:
        return 0.0
    return 1.0 if found == reference(answer) else format_score


def marked_number(completion: str) -> str | None:
    """The number behind the last `#### `, without commas; None if there is none."""
    found = _STRICT.findall(completion[-LOOKED_AT_CHARACTERS:])
    return found[-1].replace(",", "").replace("$", "") if found else None


def last_number(completion: str) -> str | None:
    """The last number as it stands; a dot by itself only where there is nothing else, None if there is none."""
    found = _NUMBER.findall(completion[-LOOKED_AT_CHARACTERS:])
    return next((number for number in reversed(found) if number != "."), ".") if found else None


def reference(answer: str | float) -> str:
    """The number of a reference: after `#### ` where there is one, else the whole text. Commas are dropped.

    A number is taken as it is, a whole one without its point: 72 and 72.0 are "72".
    """
    if isinstance(answer, int | float):
        return f"{answer:.0f}" if answer == int(answer) else str(answer)
    found = _STRICT.search(answer)
    return (found.group(1) if found else answer.strip()).replace(",", "")
