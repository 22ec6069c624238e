"""The ends of groups in every order, against a case file per prompt that is read from its beginning each time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.batches import TakenGroup
from broker.leases import Generator, Grant, OpenLease
from protocol.types import LeaseKind
from tests.schedules import fresh
from tests.simulation.generator import answer

FAILED, CRASHED, LOST, KEPT, EQUAL, FILTERED, SPLIT, TRAINED = (
    "failed", "crashed", "lost", "kept", "filtered/equal_rewards", "filtered/too_odd", "split", "trained"
)  # fmt: skip

RESULTS = st.tuples(st.sampled_from([0, 0, 1, 3, 4]), st.booleans())  # how many samples fail; whether rewards are equal


@dataclass
class Case:
    """What happened to one prompt, in order."""

    events: list[str] = field(default_factory=list)
    first_errors: list[str] = field(default_factory=list)  # of each failure

    @property
    def given_up(self) -> bool:
        return self.events.count(FAILED) >= 3

    @property
    def state(self) -> str:
        """Of a prompt that no lease holds."""
        last = self.events[-1]
        if self.given_up or last in (EQUAL, FILTERED):
            return "settled"
        return {KEPT: "finished", SPLIT: "settled", TRAINED: "settled"}.get(last, "queued")


class GroupMachine(RuleBasedStateMachine):
    """Plays the scheduler: leases prompts, fills groups with results, and ends them in all ways there are."""

    @initialize(size=st.integers(1, 2), group_size=st.integers(1, 4), filters=st.booleans())
    def start(self, size: int, group_size: int, filters: bool) -> None:
        self.filters = filters and group_size > 1
        self.size, self.group_size = size, group_size
        scheduler = fresh(prompts_per_step=size, group_size=group_size, filter_equal_rewards=self.filters)
        self.groups, self.ledger, self.leases = scheduler.groups, scheduler.ledger, scheduler.leases
        self.leases.generators["a"] = self.generator = Generator("a")
        self.cases: dict[int, Case] = {}
        self.ends: list[str] = []  # kept or filtered for equal rewards, of all groups in order
        self.given_up: list[tuple[int, str]] = []
        self.remainders: list[tuple[int, list[int], list[float]]] = []  # prompt, samples, baseline
        self.num_lost_samples = 0
        self.has_verdict = False

    @rule(number=st.integers(1, 3), takes_queued=st.booleans())
    def lease(self, number: int, takes_queued: bool) -> None:
        for _ in range(number):
            self._lease(takes_queued)

    @rule(results=st.lists(RESULTS, min_size=1, max_size=6), takes_queued=st.booleans())
    def whole_groups_end(self, results: list[tuple[int, bool]], takes_queued: bool) -> None:
        for num_bad, equal in results:
            self._results(self._lease(takes_queued), num_bad, equal, self.group_size)

    @rule(place=st.integers(0, 20), result=RESULTS, until=st.integers(1, 4))
    def results_come_in(self, place: int, result: tuple[int, bool], until: int) -> None:
        if running := self._running():
            self._results(running[place % len(running)], *result, until)

    def _lease(self, takes_queued: bool) -> OpenLease:
        if takes_queued and self.ledger.queue:
            prompt = self.ledger.queue[0]
            self.ledger.lease_again(prompt)
        else:
            prompt = self.ledger.offer()
        case = self.cases.setdefault(prompt, Case())
        alone = case.events.count(CRASHED) >= 2
        attempt, failures = self.leases.new_attempt(), case.events.count(FAILED)
        assert self.ledger.failures(prompt) == failures
        grant = Grant(LeaseKind.TRAIN, prompt, attempt, self.group_size, 0, 0, failures, alone)
        self.leases.hand_out(grant, self.generator, 0.0)
        return self.leases.open[attempt]

    def _results(self, lease: OpenLease, num_bad: int, equal: bool, until: int) -> None:
        """The samples below `until`, unless they have come: the first `num_bad` have failed."""
        for sample in range(min(until, self.group_size)):
            error = f"error {sample}" if sample < num_bad else ""
            result = answer(lease.grant, sample, 0.5 if equal else float(sample), error=error)
            lease.results.setdefault(sample, result)
        if lease.complete:
            self.leases.answered(lease, 1.0)
            self.groups.complete(lease, 1.0)
            self._completed(lease)

    def _completed(self, lease: OpenLease) -> None:
        case = self.cases[lease.grant.prompt]
        good = [result for result in lease.results.values() if not result.error]
        if lease.handed_over:
            self._remainder_ends(lease)
        elif not good or (len(good) == 1 and self.group_size > 1):
            first = lease.results[min(sample for sample, result in lease.results.items() if result.error)].error
            self._failed(lease.grant.prompt, first)
        elif self.filters and min(one.reward for one in good) == max(one.reward for one in good):
            case.events.append(EQUAL)
            self.ends.append(EQUAL)
        else:
            case.events.append(KEPT)
            self.ends.append(KEPT)

    def _failed(self, prompt: int, error: str) -> None:
        case = self.cases[prompt]
        case.events.append(FAILED)
        if case.given_up:
            self.given_up.append((prompt, error))

    def _remainder_ends(self, lease: OpenLease) -> None:
        good = sorted((result for result in lease.results.values() if not result.error), key=lambda one: one.sample)
        self.num_lost_samples += self.group_size - len(lease.results)
        late = [one.sample for one in good if one.sample not in lease.handed_over]
        if late:
            self.remainders.append((lease.grant.prompt, late, [one.reward for one in good]))

    @rule(place=st.integers(0, 20), crashed=st.booleans())
    def lose(self, place: int, crashed: bool) -> None:
        if not (running := self._running()):
            return
        lease = running[place % len(running)]
        self.groups.lose(lease, crashed)
        if lease.handed_over:
            self._remainder_ends(lease)
        elif crashed and lease.grant.alone:
            self._failed(lease.grant.prompt, "its generator crashed while it ran alone")
        else:
            self.cases[lease.grant.prompt].events.append(CRASHED if crashed else LOST)

    @rule(place=st.integers(0, 20))
    def filter(self, place: int) -> None:
        fresh_ones = [lease for lease in self._running() if not lease.results]
        if fresh_ones:
            lease = fresh_ones[place % len(fresh_ones)]
            self.groups.filter_unusable(lease, "too_odd")
            self.cases[lease.grant.prompt].events.append(FILTERED)

    @rule(until=st.integers(2, 3))
    def a_group_is_split(self, until: int) -> None:
        if self.group_size > until:
            lease = self._lease(takes_queued=False)
            self._results(lease, 0, equal=False, until=until)
            self.leases.set_aside(lease)
            self.ledger.train([lease.grant.prompt])
            self.cases[lease.grant.prompt].events.append(SPLIT)

    @rule()
    def take_what_is_finished(self) -> None:
        finished = [lease for lease in self.leases.open.values() if lease.complete]
        for lease in finished:
            self.leases.close(lease)
            self.cases[lease.grant.prompt].events.append(TRAINED)
        self.ledger.train([lease.grant.prompt for lease in finished])
        found = [self._plain(group) for group in self.groups.ended_remainders]
        assert found == self.remainders
        self.groups.ended_remainders, self.remainders = [], []

    def _plain(self, group: TakenGroup) -> tuple[int, list[int], list[float]]:
        assert group.remainder
        return group.prompt, [one.sample for one in group.trajectories], list(group.baseline_rewards)

    def _running(self) -> list[OpenLease]:
        return list(self.generator.running.values())

    @invariant()
    def ledger_and_leases_say_the_same(self) -> None:
        if not hasattr(self, "cases"):
            return
        self.ledger.check()
        held = {lease.grant.prompt for lease in self._running() if not lease.handed_over}
        queued = [p for p, case in self.cases.items() if p not in held and case.events and case.state == "queued"]
        assert list(self.ledger.queue) == sorted(queued)
        finished = [p for p, case in self.cases.items() if p not in held and case.events and case.state == "finished"]
        opened = [lease.grant.prompt for lease in self.leases.open.values()]
        assert sorted(opened) == sorted([*held, *finished])
        counts = self.ledger.counts()
        assert (counts["queued"], counts["leased"], counts["finished"]) == (len(queued), len(held), len(finished))
        for reason in (EQUAL, FILTERED):
            assert counts.get(reason, 0) == sum(reason in case.events for case in self.cases.values())
        settled_by_training = sum(TRAINED in case.events or SPLIT in case.events for case in self.cases.values())
        assert counts["trained"] == settled_by_training

    @invariant()
    def three_failures_and_nothing_else_give_a_prompt_up(self) -> None:
        if hasattr(self, "cases"):
            assert self.groups.quarantined == self.given_up
            assert self.ledger.num_quarantined == sum(case.given_up for case in self.cases.values())
            assert self.groups.num_lost_samples == self.num_lost_samples

    @invariant()
    def the_run_ends_when_nothing_is_kept_or_too_much_is_given_up(self) -> None:
        if hasattr(self, "cases"):
            in_a_row = [len(list(run)) for end, run in groupby(self.ends) if end == EQUAL]
            settled = self.ledger.num_settled
            self.has_verdict |= max(in_a_row, default=0) >= 4 * self.size
            self.has_verdict |= bool(self.given_up) and len(self.given_up) > max(3, settled / 100)
            assert bool(self.groups.verdict) == self.has_verdict


TestGroupMachine = GroupMachine.TestCase
TestGroupMachine.settings = settings(max_examples=80, stateful_step_count=30)
