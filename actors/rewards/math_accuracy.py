"""Is the completion's mathematical answer equal to the reference? Decided by math-verify.

Runs in a reward worker. The one file that imports math_verify. Its timeouts are off: they are signals, which only a
main thread may set and which a computation inside C code never sees. A string that takes for ever is ended by the
worker's deadline instead, and is an error by name. So is what escapes from it (a reference of 1/0, which nothing can
be compared with): it would give False. A step inside it that fails is one way less of finding two answers equal.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

for _name in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_name}").setLevel(logging.ERROR)  # both warn that their timeouts are off

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_END_OF_REASONING = "</think>"
_LATEX = LatexExtractionConfig(  # what is boxed before anything else; a bare number is no answer
    normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
)


def math_accuracy(completion: str, answer: Any) -> float | None:
    r"""1 if what is boxed, or the LaTeX behind "the answer is", equals the reference, else 0 (TRL's accuracy_reward).

    None, no opinion, where the reference itself cannot be read.
    """
    gold = _parse(_reference(answer))
    return _is_equal(gold, _latex(completion)) if gold else None


def math_accuracy_reasoning(completion: str, answer: Any) -> float | None:
    """As `math_accuracy` for what follows the last </think>; 0 without one (TRL's reasoning_accuracy_reward)."""
    _, closed, rest = completion.rpartition(_END_OF_REASONING)
    return math_accuracy(rest, answer) if closed else 0.0


def math_accuracy_swift(completion: str, answer: Any, unreadable: float | None = None) -> float | None:
    """As ms-swift's `accuracy`: what stands in <answer>...</answer>, as LaTeX or plain; without tags LaTeX only.

    unreadable: for a reference that cannot be read; ms-swift gives 0, and gave 1 until 2025.
    """
    text = _reference(answer)
    tagged = _ANSWER.search(text)
    gold = _parse(tagged.group(1).strip() if tagged else text, extraction_mode="first_match")
    if not gold:
        return unreadable
    answered = _ANSWER.search(completion)
    if answered is None:
        return _is_equal(gold, _latex(completion))
    return _is_equal(gold, _parse(answered.group(1).strip(), extraction_mode="first_match"))


def boxed(completion: str) -> str | None:
    """The answer that `math_accuracy` compares, as math-verify spells it: 1/2 for every half; None without one."""
    return _spelled(_latex(completion))


def boxed_behind_reasoning(completion: str) -> str | None:
    """Likewise, of `math_accuracy_reasoning`."""
    _, closed, rest = completion.rpartition(_END_OF_REASONING)
    return boxed(rest) if closed else None


def tagged(completion: str) -> str | None:
    """Likewise, of `math_accuracy_swift`."""
    answered = _ANSWER.search(completion)
    if answered is None:
        return boxed(completion)
    return _spelled(parse(answered.group(1).strip(), extraction_mode="first_match", parsing_timeout=None))


def _spelled(found: Any) -> str | None:
    return str(found[0]) if found else None


def _reference(answer: Any) -> str:
    """What follows the last ####, else everything: in a whole solution math-verify may take another number."""
    return str(answer).rpartition("####")[2]


def _latex(text: str) -> Any:
    return _parse(text, extraction_config=[_LATEX], extraction_mode="first_match")


def _parse(text: str, **how: Any) -> Any:
    return parse(text, parsing_timeout=None, raise_on_error=True, **how)


def _is_equal(gold: Any, found: Any) -> float:
    return float(verify(gold, found, timeout_seconds=None, raise_on_error=True))
