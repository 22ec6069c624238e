"""What a result must be before it may enter a batch. Pure; runs in the broker for every trajectory.

A generator with a valid key may be broken or lie: nothing of a Result is believed that can be checked here. The
reason of a refusal goes back to the sender and into the counters.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from protocol.messages import Result
from protocol.types import Completion, FinishReason, Trajectory, VersionSpan

MAX_LOGPROB = 1e-3  # rounding may put the log of a certainty a little above 0
MAX_MISSING_SHARE = 0.01  # of a completion's log-probabilities
MAX_REWARD = 1e6  # beyond it a group's mean loses what tells its members apart


def invalid_reason(
    result: Result, *, max_tokens: int, vocab_size: int, versions: range, reward_names: Collection[str]
) -> str:
    """Why this result cannot be used, or "". `versions`: what its tokens may have been sampled by."""
    if result.error:
        return "" if not len(result.tokens) else "an error with tokens"
    length = len(result.tokens)
    if not 0 < length <= max_tokens:
        return f"{length} tokens, 1 to {max_tokens} are allowed"
    if len(result.behavior_logprobs) != length:
        return f"{len(result.behavior_logprobs)} log-probabilities for {length} tokens"
    if len(result.observed) != (length if result.has_observed else 0):
        return f"{len(result.observed)} observation marks for {length} tokens"
    if result.has_observed and result.observed.all():
        return f"all of {length} tokens are observed"
    if int(result.tokens.min()) < 0 or int(result.tokens.max()) >= vocab_size:
        return f"a token outside the vocabulary of {vocab_size}"
    return _bad_logprobs(result) or _bad_spans(result, length, versions) or _bad_reward(result, reward_names)


def _bad_logprobs(result: Result) -> str:
    missing = np.isnan(result.behavior_logprobs)
    sampled = ~result.observed if result.has_observed else np.ones_like(missing)
    num_missing, num_sampled = int((missing & sampled).sum()), int(sampled.sum())
    if num_missing > MAX_MISSING_SHARE * num_sampled:
        return f"{num_missing} of {num_sampled} log-probabilities are missing"
    present = result.behavior_logprobs[~missing]
    if present.size and (float(present.max()) > MAX_LOGPROB or not np.isfinite(present).all()):
        return "a log-probability that is infinite or above 0"
    return ""


def _bad_spans(result: Result, length: int, versions: range) -> str:
    end = 0
    newest = -1
    for version, start, stop in result.spans:
        if start != end or stop <= start or version < newest:
            return f"version spans with gaps or out of order: {result.spans[:4]}"
        if version not in versions:
            return f"tokens of version {version}, {versions.start} to {versions.stop - 1} are possible"
        end, newest = stop, version
    return "" if end == length else f"version spans cover {end} of {length} tokens"


def _bad_reward(result: Result, names: Collection[str]) -> str:
    unknown = [name for name in result.rewards if name not in names]
    if unknown:
        return f"a reward called {unknown[0]}, the run has {', '.join(names)}"
    strange = [name for name in result.metrics if name.partition("/")[0] not in names or "/" not in name]
    if strange:
        return f"a metric called {strange[0]}, expected FUNCTION/KEY of {', '.join(names)}"
    foreign = [name for name in result.answers if name not in names]
    if foreign:
        return f"an answer found by {foreign[0]}, the run has {', '.join(names)}"
    values = [result.reward, *(value for value in result.rewards.values() if value is not None)]
    bad = [value for value in values if not abs(value) <= MAX_REWARD]
    return f"a reward of {bad[0]}, -{MAX_REWARD:g} to {MAX_REWARD:g} are allowed" if bad else ""


def trajectory(result: Result) -> Trajectory:
    """The result as the scheduler keeps it."""
    completion = None
    if not result.error:
        completion = Completion(
            result.tokens,
            result.behavior_logprobs,
            tuple(VersionSpan(*span) for span in result.spans),
            FinishReason(result.finish_reason),
            result.observed if result.has_observed else None,
        )
    return Trajectory(
        result.prompt,
        result.attempt,
        result.sample,
        completion,
        result.reward,
        dict(result.rewards),
        result.error,
        dict(result.metrics),
        dict(result.answers),
    )
