"""The nouns that processes exchange: prompts, completions, trajectories, leases, shares.

Plain data without behaviour beyond derived values. Arrays are numpy and are never changed after they were made.

Legend: T tokens of one sequence, G completions of one prompt (the group), P prompts of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Logprobs = NDArray[np.float32]


class FinishReason(StrEnum):
    STOP = "stop"  # the model ended the completion itself
    LENGTH = "length"  # cut off at max_tokens


class LeaseKind(StrEnum):
    TRAIN = "train"  # counted by the scheduler and the ledger
    EVALUATE = "evaluate"  # outside both; bound to exactly one policy version


class VersionSpan(NamedTuple):
    """Tokens [start, end) of a completion were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. Values at their default leave the model's distribution as it is."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's own end of sequence
    stop: tuple[str, ...] = ()  # the token that completes one of these texts is the last; special tokens are text, too


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One position of the run's endless prompt stream, tokenised."""

    number: int  # position in the stream: pass over the data * rows + position in that pass's permutation
    row: int  # row of the dataset
    tokens: Tokens  # [T]
    columns: Mapping[str, Any] = field(default_factory=dict)  # what rewards see: the row's other columns, plain JSON
    conversation: Sequence[Mapping[str, Any]] = ()  # the messages behind `tokens`, for a reward model; () without one


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine gave for one prompt."""

    tokens: Tokens  # [T], with the end-of-sequence token when the model wrote one
    behavior_logprobs: Logprobs  # [T], of the distribution that was sampled from; NaN where the engine had none
    spans: tuple[VersionSpan, ...]  # ascending, without gaps, covering [0, T)
    finish_reason: FinishReason
    observed: NDArray[np.bool_] | None = (
        None  # [T], True: given by a tool or environment, outside the loss. None: no such token
    )

    @property
    def oldest_version(self) -> int:
        return self.spans[0].version


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One completion with its reward, or the reason why there is none."""

    prompt: int  # Prompt.number
    attempt: int  # fencing number of the lease that it answers
    sample: int  # 0 .. G-1
    completion: Completion | None  # None iff `error`
    reward: float = 0.0  # weighted sum of `rewards`; meaningless when `error`
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by function; None: no opinion
    error: str = ""  # why generation or reward failed; "" when neither did
    metrics: Mapping[str, float] = field(default_factory=dict)  # what reward functions returned beside their values
    answers: Mapping[str, str] = field(default_factory=dict)  # of an evaluation: the final answer, by function


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right of one generator to answer one prompt G times, for a while."""

    kind: LeaseKind
    prompt: Prompt
    attempt: int
    samples: int  # G
    version: int  # policy version when it was granted; of an evaluation: the only version allowed
    failures: int  # failed tries before this one; part of the sampling seed
    ttl_s: float  # relative: clocks of two hosts are never compared


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The trajectories of one prompt that a batch trains together: they share a baseline.

    With `at_bound: split` the first part of a group and its remainder are two groups of the same prompt; the
    remainder's `baseline_rewards` holds the rewards of the whole group.
    """

    prompt: Prompt
    version: int  # of the lease: no token is older
    trajectories: tuple[Trajectory, ...]
    baseline_rewards: tuple[float, ...] = ()  # when not empty: the rewards to take baseline and scale from
    remainder: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ShareItem:
    """One completion of a share, with its place in the batch's reward table."""

    group: int  # row of the reward table
    sample: int  # column of the reward table
    prompt: int  # Prompt.number
    prompt_tokens: Tokens
    completion: Completion


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one learner rank trains of one batch."""

    epoch: int
    step: int
    batch_digest: bytes  # 16 bytes, equal on all ranks of one batch
    rank: int
    num_ranks: int
    total_tokens: int  # tokens inside the loss of the whole batch, all ranks
    rewards: NDArray[np.float32]  # [groups, G]; NaN where a sample is missing
    baseline_rewards: NDArray[np.float32]  # [groups, G], NaN-padded: what group statistics are taken from
    items: tuple[ShareItem, ...]
    remainder_groups: frozenset[int] = (
        frozenset()
    )  # rows of the reward table whose tokens older than S are left out of the loss
    function_rewards: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 0, 0), np.float32)
    )  # [functions, groups, G], before weighting; NaN: missing, or no opinion
    greedy_rewards: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )  # [groups], NaN: missing; only where the advantage is remax
