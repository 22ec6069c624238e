"""The five functions of the TRL notebook for GSM8K, with <reasoning> and <answer> on lines of their own.

Runs in a reward worker. The rules are the notebook's to the letter, also where they surprise: the two formats are
matched without DOTALL, so reasoning of more than one line never has either; `xml_count` takes off more for a text
without its final newline; numbers are compared as text, commas included.
"""

from __future__ import annotations

import re

_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
_PER_TAG = 0.125
_PER_CHARACTER = 0.001  # behind the answer


def xml_count(completion: str) -> float:
    """1/8 for each of the four tags that stands exactly once on its line, less what follows the answer; at most 0.5."""
    total = 0.0
    if completion.count("<reasoning>\n") == 1:
        total += _PER_TAG
    if completion.count("\n</reasoning>\n") == 1:
        total += _PER_TAG
    if completion.count("\n<answer>\n") == 1:
        total += _PER_TAG
        total -= len(completion.split("\n</answer>\n")[-1]) * _PER_CHARACTER
    if completion.count("\n</answer>") == 1:
        total += _PER_TAG
        total -= (len(completion.split("\n</answer>")[-1]) - 1) * _PER_CHARACTER
    return total


def xml_soft_format(completion: str) -> float:
    """0.5 for a text that starts with both blocks, each without a line break."""
    return 0.5 if _SOFT.match(completion) else 0.0


def xml_strict_format(completion: str) -> float:
    """0.5 for exactly both blocks, tags on lines of their own, one line in each, and a final newline."""
    return 0.5 if _STRICT.match(completion) else 0.0


def xml_int(completion: str) -> float:
    """0.5 for an answer of digits alone: neither 1,080 nor -7."""
    return 0.5 if _extracted(completion).isdigit() else 0.0


def xml_correctness(completion: str, answer: str | float) -> float:
    """2 for the reference's text, what follows its #### where it has one."""
    text = str(answer)
    reference = text.split("####")[1] if "####" in text else text
    return 2.0 if _extracted(completion) == reference.strip() else 0.0


def tagged_text(completion: str) -> str | None:
    """The answer that is compared; None where there are no tags."""
    return _extracted(completion) if "<answer>" in completion else None


def _extracted(completion: str) -> str:
    """What stands behind the last <answer>, up to </answer>; the whole text where there are no tags."""
    return completion.split("<answer>")[-1].split("</answer>")[0].strip()
