"""The schedule's numbers, and which groups make a batch.

Part of the broker process; pure. The bound on staleness is kept at a grant by `admits` and at a cut by `choose`,
which waits until everything can go that no later step could train in time. That a split group's remainder is compared
with the whole group rests on `TakenGroup.remainder_of`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate

from broker.leases import OpenLease
from protocol.config import AtBound
from protocol.types import Trajectory


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    prompts_per_step: int  # P, at least 1
    group_size: int  # completions of one lease, at least 1
    steps: int  # T, at least 1
    max_staleness: int = 2  # S, at least 0
    num_prompts: int | None = None  # length of the prompt stream; None: it has no end
    at_bound: AtBound = AtBound.WAIT
    lease_ttl_s: float = 30.0
    filter_equal_rewards: bool = False  # groups whose rewards are all equal are settled without training
    newest_first: bool = True  # no lease for a generator that could have newer weights at once
    pacing_margin: float | None = (
        2.0  # standard deviations beyond the groups that usually still run when a step ends; None: as much as admitted
    )
    gate_slow_generators: bool = True  # no lease for a generator that would hold up the others
    evaluate_at_end: bool = False  # the run is not done before its last version is evaluated


@dataclass(frozen=True, slots=True, eq=False)
class TakenGroup:
    """One group of a batch: the fields of `protocol.types.Group`, with the prompt by its number."""

    prompt: int
    version: int
    trajectories: tuple[Trajectory, ...]  # by sample; failed ones are missing
    baseline_rewards: tuple[float, ...] = ()
    remainder: bool = False

    @classmethod
    def of(cls, lease: OpenLease) -> TakenGroup:
        """What a group has so far: all of it, or the first part of one that is split."""
        return cls(lease.grant.prompt, lease.grant.version, tuple(lease.good))

    @classmethod
    def remainder_of(cls, lease: OpenLease) -> TakenGroup:
        """What came after the split, with the rewards of the whole group to compare it to."""
        late = tuple(trajectory for trajectory in lease.good if trajectory.sample not in lease.handed_over)
        rewards = tuple(trajectory.reward for trajectory in lease.good)
        return cls(lease.grant.prompt, lease.grant.version, late, rewards, remainder=True)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    step: int
    groups: tuple[
        TakenGroup, ...
    ]  # at most P, by deadline and prompt; then the remainders that ended since the last cut


def num_due(leases: Collection[OpenLease], step: int) -> int:
    """N(step) of these leases: how many of them no later step may train."""
    return sum(lease.grant.deadline <= step for lease in leases)


def each_num_due(leases: Collection[OpenLease], steps: range) -> Iterator[int]:
    """N(d) of these leases for every d of `steps`, in one pass over them: it is asked for at every grant and result."""
    counts = Counter(max(lease.grant.deadline, steps.start) for lease in leases)
    return accumulate(counts[d] for d in steps)


def admits(opened: Collection[OpenLease], deadline: int, next_step: int, last_deadline: int, size: int) -> bool:
    """True if N(d) <= (d - next_step + 1) * size still holds for every d with one more group of this deadline.

    No group has a later deadline than `last_deadline`, so nothing can break beyond it.
    """
    steps = range(deadline, last_deadline + 1)
    return all(num < (d - next_step + 1) * size for d, num in zip(steps, each_num_due(opened, steps), strict=True))


def choose(
    opened: Collection[OpenLease],
    splittable: Collection[OpenLease],
    step: int,
    last_deadline: int,
    size: int,
    num_groups: int,
) -> list[OpenLease] | None:
    """The `num_groups` groups that `step` trains, earliest deadlines first; None while it has to wait.

    need(d) = N(d) - (d - step) * size groups with deadline <= d must go now: the later steps up to d have no more room.
    So the learner trains whatever is done, and waits for a straggler only where nothing else would keep the bound.
    """
    candidates = [lease for lease in opened if lease.complete or lease in splittable]
    if len(candidates) < num_groups:
        return None
    steps = range(step, last_deadline + 1)
    for d, num_open, num_ready in zip(steps, each_num_due(opened, steps), each_num_due(candidates, steps), strict=True):
        if num_ready < num_open - (d - step) * size:
            return None
    candidates.sort(key=lambda lease: (lease.grant.deadline, lease.grant.prompt))
    return candidates[:num_groups]
