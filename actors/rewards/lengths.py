"""Rewards of nothing but the completion's length: in tokens, but for `length`.

Runs in a reward worker. max_tokens is the run's sampling.max_tokens unless the function's arguments say otherwise.
`algorithm.overlong: punish` is soft_overlong without a reward function, done by the broker.
"""

from __future__ import annotations

from collections.abc import Sequence


def soft_overlong(completion: str, completion_ids: Sequence[int], max_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_tokens - buffer_tokens, falling to -1 at max_tokens and staying there (DAPO, eq. 13; TRL)."""
    return max(soft_overlong_swift(completion, completion_ids, max_tokens, buffer_tokens), -1.0)


def soft_overlong_swift(completion: str, completion_ids: Sequence[int], max_tokens: int, buffer_tokens: int) -> float:
    """As `soft_overlong`, falling on beyond max_tokens (ms-swift's `soft_overlong`, verl's overlong buffer).

    Raises ValueError if the buffer is not between 1 and max_tokens - 1.
    """
    if not 0 < buffer_tokens < max_tokens:
        raise ValueError(
            f"expected buffer_tokens between 1 and {max_tokens - 1}, below max_tokens, got {buffer_tokens}; set it in "
            "the args of this reward"
        )
    too_many = len(completion_ids) - (max_tokens - buffer_tokens)
    return min(-too_many / buffer_tokens, 0.0)


def length(completion: str, characters: int = 1024) -> float:
    """1 for a text of more than so many characters, else 0 (the length reward of ms-swift's GRPO tutorial)."""
    return float(len(completion) > characters)
