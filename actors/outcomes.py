"""What a generator says about a lease: a scored trajectory, an error, or the lease handed back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protocol.fields import MAX_TEXT
from protocol.messages import Release, Result
from protocol.types import Completion, Lease

_NO_TOKENS = np.zeros(0, np.int32)
_NO_LOGPROBS = np.zeros(0, np.float32)
_NONE_OBSERVED = np.zeros(0, np.bool_)


def result(
    lease: Lease,
    sample: int,
    epoch: int,
    completion: Completion,
    reward: float,
    rewards: Mapping[str, float | None],
    metrics: Mapping[str, float],
    answers: Mapping[str, str],
) -> Result:
    observed = completion.observed
    return Result(
        epoch=epoch,
        prompt=lease.prompt.number,
        attempt=lease.attempt,
        sample=sample,
        finish_reason=completion.finish_reason.value,
        spans=[tuple(span) for span in completion.spans],
        reward=reward,
        rewards=dict(rewards),
        has_observed=observed is not None,
        tokens=completion.tokens,
        behavior_logprobs=completion.behavior_logprobs,
        observed=_NONE_OBSERVED if observed is None else observed,
        metrics=dict(metrics),
        answers=dict(answers),
    )


def error_result(lease: Lease, sample: int, epoch: int, error: str) -> Result:
    return Result(
        epoch=epoch,
        prompt=lease.prompt.number,
        attempt=lease.attempt,
        sample=sample,
        error=error[:MAX_TEXT].encode(errors="replace").decode(),  # a user's own words may not be Unicode
        tokens=_NO_TOKENS,
        behavior_logprobs=_NO_LOGPROBS,
        observed=_NONE_OBSERVED,
    )


def release(lease: Lease, reason: str, *, failed: bool) -> Release:
    return Release(number=lease.prompt.number, attempt=lease.attempt, reason=reason, failed=failed)
