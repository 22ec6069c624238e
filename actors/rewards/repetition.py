"""The share of n-grams that were there before: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning", C.2.

Runs in a reward worker. A completion shorter than one n-gram repeats nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def repetition(completion: str, ngram: int = 3, penalty: float = -1.0) -> float:
    """`penalty` times the repeated share of the n-grams of lower-case words (ms-swift's `repetition`)."""
    return _penalty(completion.lower().split(), ngram, penalty)


def repetition_tokens(completion: str, completion_ids: Sequence[int], ngram: int = 3, penalty: float = -1.0) -> float:
    """The same of tokens, which fits languages without spaces too (TRL's get_repetition_penalty_reward)."""
    return _penalty(completion_ids, ngram, penalty)


def _penalty(units: Sequence[Hashable], ngram: int, penalty: float) -> float:
    """penalty * (1 - distinct / all n-grams). Raises ValueError if an n-gram has no units."""
    if ngram < 1:
        raise ValueError(f"expected an ngram of at least 1, got {ngram}; set it in the args of this reward")
    grams = [tuple(units[start : start + ngram]) for start in range(len(units) - ngram + 1)]
    num_repeated = len(grams) - len(set(grams))
    return penalty * (1.0 - len(set(grams)) / len(grams)) if num_repeated else 0.0
