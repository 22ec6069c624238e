r"""DAPO's scorer for mathematics: does the text behind `Answer:` equal the reference, once both are normalised?

Runs in a reward worker. 1 or -1, as verl's `math_dapo` gives it; only the last 300 characters are looked at. The
normalisation is that of Minerva (Lewkowycz et al. 2022, appendix D.1): text in, text out, no mathematics in between.
"""

from __future__ import annotations

import re
from typing import Any

LOOKED_AT_CHARACTERS = 300
LOOKED_AT_FOR_A_BOX = 100
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BOX = "\\boxed{"

# In this order, each on what the one before left.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_UNITS = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
]
_MARKS = (
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}"),
    *("^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r".*?\$(.*?)\$.*", r"$\1$"),  # only what is between the first two dollar signs
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),
        (r"sqrt([^{])", r"sqrt{\1}"),
    )
)


def math_dapo(completion: str, answer: Any, strict_box: bool = False) -> float:
    r"""1 if the last `Answer:` line is the reference, else -1; strict_box: the last \boxed, compared as it stands."""
    reference = str(answer) if strict_box else normalised(str(answer))
    return 1.0 if stated_answer(completion, strict_box) == reference else -1.0


def stated_answer(completion: str, strict_box: bool = False) -> str | None:
    """What is compared with the reference; None if nothing is stated."""
    seen = completion[-LOOKED_AT_CHARACTERS:]
    if strict_box:
        return last_box(seen[-LOOKED_AT_FOR_A_BOX:])
    found = _ANSWER.findall(seen)
    return normalised(found[-1]) if found else None


def normalised(text: str) -> str:
    """What follows the last =, without units, filler words and LaTeX that only changes the look."""
    text = text.split("=")[-1]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for gone in (*_UNITS, *_MARKS):
        text = text.replace(gone, "")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces counted; None without one, or if it is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0 and text[end] == "}":
            return text[start + len(_BOX) : end]
    return None
