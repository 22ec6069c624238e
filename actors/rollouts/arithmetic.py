"""Sums as GSM8K writes them, worked out exactly: numbers, + - * / and brackets, nothing else.

Pure. What a model writes is not to be trusted: there are no names, no powers and no evaluation of code, and length and
depth are bounded, so that the worst text costs microseconds and its result has fewer digits than the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_CHARACTERS, MAX_DEPTH = 120, 20
DECIMALS = 4  # of a result that is no whole number
_SPACED = re.compile(r"([0-9][0-9,]*\.?[0-9]*|\.[0-9]+|[-+*/()%])\s*")


class NotASum(ValueError):
    """The text is none, or has no result."""


def worked_out(text: str) -> str:
    """The result as GSM8K writes it: 1692, 0.5, -3. Raises NotASum."""
    if len(text) > MAX_CHARACTERS:
        raise NotASum(f"more than {MAX_CHARACTERS} characters")
    tokens = [*_tokens(text.strip().replace("$", ""))]
    value, rest = _sum(tokens, 0)
    if rest:
        raise NotASum(f"{rest[0]} behind the end")
    return _written(value)


def _tokens(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        found = _SPACED.match(text, place)
        if found is None:
            raise NotASum(f"no part of a sum: {text[place]}")
        yield found.group(1)
        place = found.end()


def _sum(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """Value of the terms that `tokens` begin with, and what stands behind them."""
    value, rest = _product(tokens, depth)
    while rest and rest[0] in "+-":
        term, behind = _product(rest[1:], depth)
        value, rest = (value + term if rest[0] == "+" else value - term), behind
    return value, rest


def _product(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, rest = _factor(tokens, depth)
    while rest and rest[0] in "*/":
        factor, behind = _factor(rest[1:], depth)
        if rest[0] == "/" and factor == 0:
            raise NotASum("a division by zero")
        value, rest = (value * factor if rest[0] == "*" else value / factor), behind
    return value, rest


def _factor(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """A number, a sum in brackets, or either with a sign before it; per cent behind it."""
    if not tokens or depth > MAX_DEPTH:
        raise NotASum("brackets too deep" if tokens else "a number is missing")
    first, *rest = tokens
    if first in "+-":
        value, rest = _factor(rest, depth + 1)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _sum(rest, depth + 1)
        if not rest or rest[0] != ")":
            raise NotASum("a bracket is open")
        rest = rest[1:]
    elif first[0].isdigit() or first[0] == ".":
        value = Fraction(first.replace(",", "").removesuffix("."))
    else:
        raise NotASum(f"{first} where a number belongs")
    if rest and rest[0] == "%":
        return value / 100, rest[1:]
    return value, rest


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rounded = round(abs(value) * 10**DECIMALS)
    whole, decimals = divmod(rounded, 10**DECIMALS)
    sign = "-" if value < 0 and rounded else ""
    return f"{sign}{whole}.{decimals:0{DECIMALS}}".rstrip("0").rstrip(".")
