"""What a sample is asked for with, and what comes of it: pure, in the generator process.

A rollout (`actors/rollouts/`, or a user's own) is an async function from an engine and a prompt to a completion or an
`Episode`. It never sees weights or leases: the generator swaps weights under it, and every token of its completion
carries the version it was sampled by. That a repeated generation is the same generation rests on the seeds made here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from protocol.config import Config
from protocol.errors import TetherError
from protocol.types import Completion, Lease, LeaseKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Attempt:
    """One sample of one lease, as the engine is asked for it."""

    request_id: str
    sampling: SamplingParams
    seed: int | None  # None: greedy, no randomness


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """What a rollout made, where a completion alone does not say it all."""

    completion: Completion
    reward: float | None = None  # of the environment itself, times `rollout.weight`; None: no opinion
    metrics: Mapping[str, float] = field(default_factory=dict)  # become the curves reward/environment/KEY


class RolloutFailed(TetherError):
    """A rollout raised, hung, or made what cannot be trained. Says which and why."""


def sampling_for(lease: Lease, sample: int, config: Config) -> SamplingParams:
    """How a sample of this lease is drawn; greedily behind the G samples that are trained."""
    if lease.kind is LeaseKind.EVALUATE:
        return config.evaluation_params()
    params = config.sampling.params()
    return params if sample < config.batch.group_size else replace(params, temperature=0.0)


def attempt_for(lease: Lease, name: str, sample: int, sampling: SamplingParams, run_seed: int) -> Attempt:
    """What to ask the engine for. `name`: of the lease, different from any that the engine may still be busy with.

    A repeated generation is the same generation: the lease's attempt is no part of the seed.
    """
    request_id = f"{name}-{sample}"
    if sampling.temperature == 0.0:
        return Attempt(request_id, sampling, None)
    return Attempt(request_id, sampling, sampling_seed(run_seed, lease.prompt.number, sample, lease.failures))


def turn_seed(attempt: Attempt, turn: int) -> int | None:
    """The first turn has the sample's own seed, each later one another that follows from it."""
    if attempt.seed is None or turn == 0:
        return attempt.seed
    return _natural_of_63_bits(f"{attempt.seed}/turn {turn}")


def sampling_seed(run_seed: int, prompt: int, sample: int, failures: int) -> int:
    """63 bits from who asks for what; a failed try is sampled anew, a lost one is not."""
    return _natural_of_63_bits(f"{run_seed}/{prompt}/{sample}/{failures}")


def _natural_of_63_bits(text: str) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
