"""An evaluation under every order of events: all prompts, one version, nothing of an earlier try, and an end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.evaluation import Evaluation
from broker.leases import Generator, Grant, LeaseTable, OpenLease
from protocol.types import LeaseKind
from tests.simulation.generator import answer

SESSIONS = ("a", "b", "c")


class EvaluationMachine(RuleBasedStateMachine):
    """Plays the scheduler, a learner that goes on, and generators that come, change their version and die."""

    @initialize(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True), samples=st.integers(1, 4))
    def start(self, numbers: list[int], samples: int) -> None:
        self.table = LeaseTable(ttl_s=30.0)
        self.newest = self.version = 0  # the learner's, and the one that is evaluated
        self.numbers, self.samples = numbers, samples
        self.evaluation = Evaluation(self.table, numbers, samples, version=0)
        self.now = 0.0
        self.holders: dict[str, int] = {}  # version by session
        self.out: dict[int, OpenLease] = {}  # by prompt: leased and not answered in this try
        self.answered: dict[int, list[tuple[int, str]]] = {}  # by prompt: (attempt, error) of each sample of this try
        self.attempts: set[int] = set()

    @rule(session=st.sampled_from(SESSIONS), behind=st.sampled_from([0, 0, 0, 1, 2]), wanted=st.integers(0, 6))
    def pull(self, session: str, behind: int, wanted: int) -> None:
        """As the scheduler does it: what it holds is noted, then leases are asked for."""
        generator = self.table.generators.setdefault(session, Generator(session))
        version = max(self.newest - behind, -1)
        generator.pulls(version, 9, self.now)
        self.holders[session] = version
        self._settle()
        for _ in range(wanted):
            waiting = [n for n in self.numbers if n not in self.out and n not in self.answered]
            grant = self.evaluation.lease(generator, self.now)
            assert (grant is not None) == (bool(waiting) and version == self.version)
            if grant is not None:
                self._leased(grant, waiting)

    def _leased(self, grant: Grant, waiting: list[int]) -> None:
        assert grant.prompt in waiting
        assert grant.attempt not in self.attempts
        kind, samples = LeaseKind.EVALUATE, self.samples
        assert (grant.kind, grant.samples, grant.version, grant.deadline) == (kind, samples, self.version, self.version)
        lease = self.table.find(grant.attempt)
        assert lease is not None
        self.attempts.add(grant.attempt)
        self.out[grant.prompt] = lease

    @rule(places=st.lists(st.integers(0, 9), min_size=1, max_size=4), error=st.sampled_from(["", "no answer"]))
    def answers_come(self, places: list[int], error: str) -> None:
        for place in places[: len(self.out)]:
            lease = self.out.pop(sorted(self.out)[place % len(self.out)])
            for sample in range(self.samples):
                lease.results[sample] = answer(lease.grant, sample, 1.0, error=error)
            self.table.answered(lease, self.now)
            self.evaluation.answered(lease)
            self.answered[lease.grant.prompt] = [(lease.grant.attempt, error)] * self.samples
            self._settle()

    @rule(place=st.integers(0, 9), count=st.integers(1, 3))
    def some_of_its_samples_come(self, place: int, count: int) -> None:
        """The scheduler keeps them at the lease, and asks the evaluation only when it has all of them."""
        if self.out:
            lease = self.out[sorted(self.out)[place % len(self.out)]]
            for sample in range(min(count, self.samples - 1)):
                lease.results[sample] = answer(lease.grant, sample, 0.0)

    @rule(place=st.integers(0, 9))
    def a_lease_is_lost(self, place: int) -> None:
        if self.out:
            self.evaluation.lost(self.out.pop(sorted(self.out)[place % len(self.out)]))
            self._settle()

    @rule(session=st.sampled_from(SESSIONS))
    def a_generator_dies(self, session: str) -> None:
        if session in self.holders:
            for lease in list(self.table.generators[session].running.values()):
                self.evaluation.lost(self.out.pop(lease.grant.prompt))
            del self.table.generators[session], self.holders[session]
            self._settle()

    @rule()
    def the_learner_goes_on(self) -> None:
        self.newest += 1
        self._settle()

    def _settle(self) -> None:
        """The scheduler asks after every event; and here is the rule, in other words."""
        self.evaluation.restart_if_unanswerable(self.newest)
        if len(self.answered) < len(self.numbers) and self.version not in self.holders.values():
            self.version = self.newest
            self.out, self.answered = {}, {}

    @invariant()
    def every_prompt_is_answered_leased_or_waiting(self) -> None:
        if hasattr(self, "evaluation"):
            assert self.evaluation.version == self.version
            assert self.evaluation.num_missing == len(self.numbers) - len(self.answered)
            held = {lease.grant.attempt for lease in self.out.values()}
            assert {lease.grant.attempt for lease in self.table.evaluations} == held
            assert not self.table.open, "an evaluation counts nowhere in the bound"
            running = {attempt for generator in self.table.generators.values() for attempt in generator.running}
            assert running == held

    @invariant()
    def the_result_is_all_answers_of_one_version_in_order(self) -> None:
        if not hasattr(self, "evaluation") or self.evaluation.num_missing:
            return
        result = self.evaluation.result()
        assert result.version == self.version
        wanted = [
            (number, attempt, sample, error)
            for number in self.numbers
            for sample, (attempt, error) in enumerate(self.answered[number])
        ]
        assert [(one.prompt, one.attempt, one.sample, one.error) for one in result.trajectories] == wanted
        versions = {span.version for one in result.trajectories if one.completion for span in one.completion.spans}
        assert versions <= {self.version}

    def teardown(self) -> None:
        """From wherever it stands: one generator that holds the newest version brings it to its end."""
        if not hasattr(self, "evaluation"):
            return
        for session in SESSIONS:
            self.a_generator_dies(session)
        self.pull("a", behind=0, wanted=len(self.numbers))
        for lease in list(self.out.values()):
            for sample in range(self.samples):
                lease.results[sample] = answer(lease.grant, sample, 1.0)
            self.evaluation.answered(lease)
        assert self.evaluation.num_missing == 0


TestEvaluationMachine = EvaluationMachine.TestCase
TestEvaluationMachine.settings = settings(max_examples=60, stateful_step_count=40)
