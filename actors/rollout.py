"""How a prompt becomes trajectories: one answer, or later a conversation with tools.

A rollout is an async function from an engine and a prompt to completions. It never sees weights, leases or rewards: the
generator swaps weights under it, and every token of its completions carries the version it was sampled by.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from actors.engine import Engine
from protocol.config import Config
from protocol.types import Completion, Lease, LeaseKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Attempt:
    """One sample of one lease, as the engine is asked for it."""

    request_id: str
    sampling: SamplingParams
    seed: int | None  # None: greedy, no randomness


async def single_turn(engine: Engine, lease: Lease, attempt: Attempt) -> Completion:
    """The plain case: the prompt's tokens in, one completion out."""
    return await engine.generate(attempt.request_id, lease.prompt.tokens, attempt.sampling, attempt.seed)


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


def sampling_seed(run_seed: int, prompt: int, sample: int, failures: int) -> int:
    """63 bits from who asks for what; a failed try is sampled anew, a lost one is not."""
    digest = hashlib.sha256(f"{run_seed}/{prompt}/{sample}/{failures}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
