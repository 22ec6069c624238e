"""The schedule's numbers, and which groups make a batch.

Part of the broker process; pure. The bound on staleness is kept at a grant by `admits` and at a cut by `is_enough`,
which waits until everything can go that no later step could train in time. Both are asked at every grant, and again
for everybody who waits whenever something changed, so they look at numbers of groups by deadline alone: `LeaseTable`
keeps them. That a split group's remainder is compared with the whole group rests on `TakenGroup.remainder_of`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from broker.leases import OpenLease
from protocol.sections import AtBound
from protocol.types import Trajectory


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    prompts_per_step: int  # P, at least 1
    group_size: int  # completions of one lease, at least 1
    steps: int  # T; 0: the model is only evaluated
    max_staleness: int = 2  # S, at least 0
    num_prompts: int | None = None  # length of the prompt stream; None: it has no end
    at_bound: AtBound = AtBound.WAIT
    lease_ttl_s: float = 30.0
    baseline_sample: int | None = None  # a group is of no use without this one: the greedy one of remax
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


def each_num_due(by_deadline: Counter[int], steps: range) -> Iterator[int]:
    """N(d) for every d of `steps`: how many of these groups no step after d may train."""
    num = sum(count for deadline, count in by_deadline.items() if deadline < steps.start)
    for step in steps:
        num += by_deadline[step]
        yield num


def admits(num_open: Counter[int], deadline: int, next_step: int, last_deadline: int, size: int) -> bool:
    """True if N(d) <= (d - next_step + 1) * size still holds for every d with one more group of this deadline.

    No group has a later deadline than `last_deadline`, so nothing can break beyond it.
    """
    steps = range(deadline, last_deadline + 1)
    return all(num < (d - next_step + 1) * size for d, num in zip(steps, each_num_due(num_open, steps), strict=True))


def is_enough(
    num_open: Counter[int], num_ready: Counter[int], step: int, last_deadline: int, size: int, num_groups: int
) -> bool:
    """Whether `step` may train `num_groups` of the groups that are ready, or has to wait.

    need(d) = N(d) - (d - step) * size groups with deadline <= d must go now: the later steps up to d have no more room.
    So the learner trains whatever is done, and waits for a straggler only where nothing else would keep the bound.
    """
    steps = range(step, last_deadline + 1)
    due = zip(steps, each_num_due(num_open, steps), each_num_due(num_ready, steps), strict=True)
    has_all_due = all(ready >= opened - (d - step) * size for d, opened, ready in due)
    return has_all_due and num_ready.total() >= num_groups


def choose(ready: Iterable[OpenLease], num_groups: int) -> list[OpenLease]:
    """The groups that a step trains of those that are ready: the earliest deadlines, ties by prompt."""
    return sorted(ready, key=lambda lease: (lease.grant.deadline, lease.grant.prompt))[:num_groups]
