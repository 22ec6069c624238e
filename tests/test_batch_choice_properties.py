"""Which groups make a batch, and whether one more may be leased, against every way to spread open groups over steps.

The rules are two inequalities; what they promise is that a plan exists: each open group in some step up to its
deadline, at most P groups a step. Here all plans are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.batches import admits, choose, is_enough
from broker.leases import Grant, OpenLease
from protocol.types import LeaseKind
from tests.simulation.generator import answer

STEP = 2


class Scene(NamedTuple):
    """Open groups before the batch of STEP."""

    size: int  # P
    last_deadline: int
    leases: list[OpenLease]


def open_lease(prompt: int, deadline: int, is_complete: bool) -> OpenLease:
    grant = Grant(LeaseKind.TRAIN, prompt, prompt + 1, 1, version=0, deadline=deadline)
    lease = OpenLease(grant, "a", 0.0, 0.0)
    if is_complete:
        lease.results[0] = answer(grant, 0, 1.0)
    return lease


def deadlines(leases: list[OpenLease]) -> tuple[int, ...]:
    return tuple(sorted(lease.grant.deadline for lease in leases))


def num_by_deadline(leases: list[OpenLease]) -> Counter[int]:
    return Counter(lease.grant.deadline for lease in leases)


def batch_of(
    opened: list[OpenLease], splittable: list[OpenLease], last_deadline: int, size: int, step: int, num_groups: int
) -> list[OpenLease] | None:
    """What the step takes; None while it has to wait."""
    ready = [lease for lease in opened if lease.complete or lease in splittable]
    num_open, num_ready = num_by_deadline(opened), num_by_deadline(ready)
    enough = is_enough(num_open, num_ready, step, last_deadline, size, num_groups)
    return choose(ready, num_groups) if enough else None


@cache
def has_plan(open_deadlines: tuple[int, ...], room: tuple[tuple[int, int], ...]) -> bool:
    """Tries every step for the first group, and then for the others. `room`: (step, groups it can still take)."""
    if not open_deadlines:
        return True
    first, *others = open_deadlines
    for step, left in room:
        if step <= first and left:
            rest = tuple((s, n - (s == step)) for s, n in room)
            if has_plan(tuple(others), rest):
                return True
    return False


def can_be_trained(leases: list[OpenLease], first_step: int, last_deadline: int, size: int) -> bool:
    return has_plan(deadlines(leases), tuple((step, size) for step in range(first_step, last_deadline + 1)))


def scenes() -> Iterator[Scene]:
    """Every way to have up to 6 open groups that a plan exists for, and P, and steps to train them in."""
    for size, ahead, most in ((1, 0, 1), (1, 1, 2), (1, 3, 4), (2, 1, 4), (2, 2, 6), (2, 3, 6), (3, 2, 6)):
        kinds = list(product(range(STEP, STEP + ahead + 1), (False, True)))
        for num_groups in range(most + 1):
            for groups in combinations_with_replacement(kinds, num_groups):
                leases = [open_lease(prompt, *group) for prompt, group in enumerate(groups[::-1])]
                if can_be_trained(leases, STEP, STEP + ahead, size):
                    yield Scene(size, STEP + ahead, leases)


def test_a_batch_is_cut_exactly_when_some_batch_leaves_a_plan_for_the_rest() -> None:
    """The batch that is cut has the earliest deadlines of all such batches."""
    num_cut = num_waits = 0
    for (size, last, leases), num_to_offer, splits in product(scenes(), (0, 1, 5), (False, True)):
        num_groups = min(size, len(leases) + num_to_offer)
        splittable = [one for one in leases if splits and not one.complete and one.grant.deadline == STEP]
        ready = [one for one in leases if one.complete or one in splittable]
        batches = [
            sorted((one.grant.deadline, one.grant.prompt) for one in batch)
            for batch in combinations(ready, num_groups)
            if can_be_trained([one for one in leases if one not in batch], STEP + 1, last, size)
        ]
        chosen = batch_of(leases, splittable, last, size, STEP, num_groups)
        told = f"P {size}, to offer {num_to_offer}, ready {[o.grant.prompt for o in ready]} of {deadlines(leases)}"
        if chosen is None:
            assert not batches, f"{told}: waits, but {batches[0]} could go"
        else:
            order = [(one.grant.deadline, one.grant.prompt) for one in chosen]
            assert batches, f"{told}: {order} goes, and the rest has no plan"
            assert order == min(batches), told
        num_cut, num_waits = num_cut + (chosen is not None), num_waits + (chosen is None)
    assert min(num_cut, num_waits) > 1000


def test_a_lease_is_granted_exactly_when_a_plan_for_it_and_all_others_exists() -> None:
    num_granted = num_refused = 0
    for size, last, leases in scenes():
        for deadline in range(STEP, last + 1):
            one_more = [*leases, open_lease(len(leases), deadline, False)]
            is_granted = admits(num_by_deadline(leases), deadline, STEP, last, size)
            assert is_granted == can_be_trained(one_more, STEP, last, size), f"{deadline} beside {deadlines(leases)}"
            num_granted, num_refused = num_granted + is_granted, num_refused + (not is_granted)
    assert min(num_granted, num_refused) > 500


class PlanMachine(RuleBasedStateMachine):
    """Leases by `admits`, cuts by `is_enough` and `choose`; groups finish in any order, or are lost.

    A plan exists at all times.
    """

    @initialize(size=st.integers(1, 3), bound=st.integers(0, 3), steps=st.integers(1, 8))
    def start(self, size: int, bound: int, steps: int) -> None:
        self.size, self.bound, self.steps = size, bound, steps
        self.step = 0  # the next batch
        self.num_offered = 0
        self.open: list[OpenLease] = []
        self.trained: Counter[int] = Counter()

    @property
    def last_deadline(self) -> int:
        return min(self.step + self.bound, self.steps - 1)

    def next_batch(self) -> list[OpenLease] | None:
        return batch_of(self.open, [], self.last_deadline, self.size, self.step, self.size)

    @rule(lag=st.integers(0, 3), wanted=st.integers(1, 12))
    def lease(self, lag: int, wanted: int) -> None:
        deadline = min(self.step - min(lag, self.step) + self.bound, self.steps - 1)
        while wanted and deadline >= self.step:
            if not admits(num_by_deadline(self.open), deadline, self.step, self.last_deadline, self.size):
                return
            self.open.append(open_lease(self.num_offered, deadline, False))
            self.num_offered, wanted = self.num_offered + 1, wanted - 1

    @rule(data=st.data(), is_lost=st.booleans())
    def one_ends(self, data: st.DataObject, is_lost: bool) -> None:
        running = [lease for lease in self.open if not lease.complete]
        if running:
            lease = data.draw(st.sampled_from(running))
            if is_lost:
                self.open.remove(lease)
            else:
                lease.results[0] = answer(lease.grant, 0, 1.0)

    @rule()
    def all_end(self) -> None:
        for lease in self.open:
            lease.results[0] = answer(lease.grant, 0, 1.0)

    @rule()
    def cut(self) -> None:
        if self.step < self.steps:
            batch = self.next_batch()
            for lease in batch or []:
                assert lease.grant.deadline >= self.step, f"{lease.grant} comes too late for step {self.step}"
                self.open.remove(lease)
                self.trained[lease.grant.prompt] += 1
            self.step += batch is not None

    @invariant()
    def every_open_group_can_still_be_trained_in_time(self) -> None:
        if hasattr(self, "open"):
            assert can_be_trained(self.open, self.step, self.last_deadline, self.size)
            assert max(self.trained.values(), default=1) == 1

    @invariant()
    def what_is_finished_never_blocks_the_next_batch(self) -> None:
        """With everything finished and enough of it, there is nothing left to wait for."""
        if hasattr(self, "open") and len(self.open) >= self.size and all(lease.complete for lease in self.open):
            assert self.next_batch() is not None


TestPlanMachine = PlanMachine.TestCase
TestPlanMachine.settings = settings(max_examples=60, stateful_step_count=50)
