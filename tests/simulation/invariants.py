"""What holds in a scheduler at every moment, whatever happened before.

Used by simulations only: the ledger agrees with the books and with the leases, the inequality behind the bound on
staleness holds, and memory stays within its bound.
"""

from __future__ import annotations

from collections import Counter

from broker.ledger import LedgerSnapshot
from broker.scheduler import Scheduler
from tests.simulation.books import Books


def check_ledger(scheduler: Scheduler, books: Books) -> None:
    """The sum, and every term of it counted in another way."""
    ledger, opened = scheduler.ledger, scheduler.leases.open
    counts = ledger.counts()
    states = ("queued", "leased", "finished", "trained", "filtered", "failed")
    assert counts["offered"] == sum(counts[state] for state in states), f"{counts}"
    assert counts["trained"] == len(books.trained), f"{counts}, trained: {sorted(books.trained)}"
    assert counts["filtered"] == len(books.filtered), f"{counts}, filtered: {sorted(books.filtered)}"
    assert ledger.num_quarantined == len(books.quarantined), f"{counts}, quarantined: {sorted(books.quarantined)}"
    assert counts["failed"] == len(books.quarantined) + len(books.non_finite), f"{counts}"
    num_finished = sum(lease.complete for lease in opened.values())
    assert (counts["finished"], counts["leased"]) == (num_finished, len(opened) - num_finished), f"{counts}"


def check_bound(scheduler: Scheduler) -> None:
    """N(d) <= (d - next + 1) * P for every d that has a group."""
    size, step, num_open = scheduler.settings.prompts_per_step, scheduler.next_step, 0
    leases = scheduler.leases
    by_deadline = Counter(lease.grant.deadline for lease in leases.open.values())
    finished = Counter(lease.grant.deadline for lease in leases.open.values() if lease.complete)
    assert (leases.num_open, leases.num_finished) == (by_deadline, finished), "groups are counted wrongly by deadline"
    for deadline in sorted(by_deadline):
        num_open += by_deadline[deadline]
        room = (deadline - step + 1) * size
        assert num_open <= room, f"N({deadline}) is {num_open} before step {step}, {room} are allowed"


def check_memory(scheduler: Scheduler) -> None:
    """Results of (S + 1) * P groups and P remainders at most, and no lease that nothing waits for."""
    settings, leases = scheduler.settings, scheduler.leases
    remainders, ended = leases.remainders, scheduler.groups.ended_remainders
    num_remainders = len(remainders) + len(ended)
    assert num_remainders <= settings.prompts_per_step, f"{num_remainders} remainders"
    evaluation = scheduler.evaluation
    num_evaluated = len(leases.aside) - len(remainders)
    assert num_evaluated <= (evaluation.num_missing if evaluation else 0), f"{num_evaluated} leases are aside"
    num_results = sum(len(lease.results) for lease in (*leases.open.values(), *remainders))
    num_results += sum(len(one.trajectories) for one in ended)
    most = (settings.max_staleness + 2) * settings.prompts_per_step * settings.group_size
    assert num_results <= most, f"{num_results} results are held, {most} are allowed"


def check_prompts(snapshot: LedgerSnapshot, books: Books, failures: Counter[int], crashes: Counter[int]) -> None:
    """Every prompt ever offered is settled in one way, or open; what is remembered of the open ones is right."""
    unsettled, settled = set(snapshot["unsettled"]), books.settled
    assert len(settled) == books.num_settled, f"a prompt is settled in two ways: {books}"
    assert not unsettled & settled, f"{sorted(unsettled & settled)} are settled, and open"
    assert unsettled | settled == set(range(snapshot["offered"])), f"{snapshot['offered']} offered: {books}"
    assert +Counter(dict(snapshot["failures"])) == +failures, f"{snapshot['failures']}, counted: {failures}"
    assert +Counter(dict(snapshot["crashes"])) == +crashes, f"{snapshot['crashes']}, counted: {crashes}"
