"""Short right answers, long wrong ones: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning", appendix C.1.

Runs in a reward worker. t is the completion's length in tokens, T is max_tokens.

    r(t) = at T + (at 0 - at T) * (1 + cos(pi t / T)) / 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from actors.rewards.math_accuracy import math_accuracy, math_accuracy_swift


def cosine(
    completion: str,
    answer: Any,
    completion_ids: Sequence[int],
    max_tokens: int,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> float | None:
    """TRL's get_cosine_scaled_reward: right as `math_accuracy` says, None with it; beyond max_tokens it stays."""
    correct = math_accuracy(completion, answer)
    if correct is None:
        return None
    short, long = (correct_short, correct_long) if correct else (wrong_short, wrong_long)
    return _between(short, long, min(len(completion_ids) / max_tokens, 1.0))


def cosine_swift(
    completion: str,
    answer: Any,
    completion_ids: Sequence[int],
    max_tokens: int,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -0.5,
    wrong_long: float = 0.0,
) -> float | None:
    """ms-swift's `cosine`: right as `math_accuracy_swift` says; beyond max_tokens it comes back, as cosines do.

    None for a reference that cannot be read, where ms-swift takes the answer as wrong.
    """
    correct = math_accuracy_swift(completion, answer)
    if correct is None:
        return None
    short, long = (correct_short, correct_long) if correct else (wrong_short, wrong_long)
    return _between(short, long, len(completion_ids) / max_tokens)


def _between(short: float, long: float, share: float) -> float:
    return long + (short - long) * (1.0 + math.cos(math.pi * share)) / 2.0
