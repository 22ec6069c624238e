"""The scheduler under every order of events that hypothesis finds: the bound holds, nothing is lost, it always ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.batches import Batch, ScheduleSettings
from broker.leases import Grant, ResultStatus, Wait
from broker.ledger import Ledger
from broker.outlook import describe
from broker.scheduler import Scheduler
from protocol.sections import AtBound
from protocol.types import LeaseKind
from tests.simulation.generator import answer

SESSIONS = ["a", "b", "c"]
TTL_S = 30.0

schedules = st.builds(
    ScheduleSettings,
    prompts_per_step=st.integers(1, 4),
    group_size=st.integers(1, 4),
    steps=st.integers(1, 12),
    max_staleness=st.integers(0, 3),
    num_prompts=st.none() | st.integers(1, 24),
    at_bound=st.sampled_from(AtBound),
    lease_ttl_s=st.just(TTL_S),
    filter_equal_rewards=st.booleans(),
    newest_first=st.booleans(),
    pacing_margin=st.none() | st.floats(0, 2),
    gate_slow_generators=st.booleans(),
    evaluate_at_end=st.booleans(),
).filter(lambda schedule: schedule.group_size > 1 or not schedule.filter_equal_rewards)


def needs(condition: Callable[[SchedulerMachine], object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return precondition(lambda machine: bool(condition(machine)))


class SchedulerMachine(RuleBasedStateMachine):
    """Plays server, learner and three generators, honest or not, and keeps its own books of what was trained."""

    @initialize(schedule=schedules)
    def start(self, schedule: ScheduleSettings) -> None:
        self.schedule = schedule
        self.scheduler = Scheduler(schedule, Ledger())
        self.now = 0.0
        self.versions = dict.fromkeys(SESSIONS, 0)
        self.held: dict[int, tuple[str, Grant]] = {}  # by attempt: what generators believe they hold
        self.accepted: Counter[tuple[int, int]] = Counter()  # (attempt, sample)
        self.void: list[Grant] = []  # leases that the scheduler took back
        self.trained: list[int] = []
        self.skipped: list[int] = []
        self.num_too_long = self.num_too_long_at_cut = 0
        self.last_batch: list[int] = []
        self.at_cut = self.scheduler.ledger.snapshot()

    # What generators do

    @rule(session=st.sampled_from(SESSIONS), room=st.integers(0, 12), catches_up=st.booleans(), newer=st.booleans())
    def pull(self, session: str, room: int, catches_up: bool, newer: bool) -> None:
        if catches_up and not any(one.kind is LeaseKind.EVALUATE for who, one in self.held.values() if who == session):
            self.versions[session] = self.scheduler.version
        version, scheduler = self.versions[session], self.scheduler
        given = scheduler.pull(session, version, room, self.now, newer and version < scheduler.version)
        for grant in [] if isinstance(given, Wait) else given:
            assert grant.attempt not in self.held, f"attempt {grant.attempt} was given twice"
            assert grant.version == version
            assert grant.prompt not in self.trained or grant.kind is LeaseKind.EVALUATE
            self.held[grant.attempt] = session, grant

    @needs(lambda self: self.held)
    @rule(data=st.data(), sample=st.integers(0, 3), is_good=st.integers(0, 9), reward=st.integers(0, 1))
    def finish_a_sample(self, data: st.DataObject, sample: int, is_good: int, reward: int) -> None:
        session, grant = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        newest = grant.version if grant.kind is LeaseKind.EVALUATE else max(grant.version, self.versions[session])
        result = answer(grant, sample % grant.samples, float(reward), newest, "" if is_good else "no answer")
        was_known = self.scheduler.leases.find(grant.attempt) is not None
        status = self.scheduler.finished(result, self.now)
        assert status in (ResultStatus.ACCEPTED, ResultStatus.DUPLICATE, ResultStatus.LATE)
        assert (status is ResultStatus.LATE) == (not was_known)
        self.accepted[grant.attempt, result.sample] += status is ResultStatus.ACCEPTED
        assert self.accepted[grant.attempt, result.sample] <= 1, "a result was accepted twice"

    @needs(lambda self: self.held)
    @rule(data=st.data())
    def finish_a_group(self, data: st.DataObject) -> None:
        session, grant = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        newest = grant.version if grant.kind is LeaseKind.EVALUATE else max(grant.version, self.versions[session])
        for sample in range(grant.samples):
            self.scheduler.finished(answer(grant, sample, float(sample), newest), self.now)

    @rule(
        session=st.sampled_from(SESSIONS),
        num_left=st.integers(0, 2),
        num_samples=st.integers(0, 3),
        steps=st.integers(1, 4),
    )
    def run_smoothly(self, session: str, num_left: int, num_samples: int, steps: int) -> None:
        """A generator finishes all that it can get but its oldest groups, and the learner trains what is ready."""
        for _ in range(steps):
            self.pull(session, room=48, catches_up=True, newer=False)
            attempts = sorted(attempt for attempt, (who, _) in self.held.items() if who == session)
            for index, attempt in enumerate(attempts):
                grant = self.held[attempt][1]
                samples = range(min(num_samples, grant.samples)) if index < num_left else range(grant.samples)
                for sample in samples:
                    status = self.scheduler.finished(answer(grant, sample, float(sample)), self.now)
                    self.accepted[attempt, sample] += status is ResultStatus.ACCEPTED
                if self.scheduler.leases.find(attempt) is None:
                    del self.held[attempt]
            if self.scheduler.ready:
                self.cut()
            if self.scheduler.training is not None:
                self.advance(step_s=1.0, skipped=1)

    @rule(ahead=st.integers(1, 3))
    def pull_with_a_version_that_does_not_exist(self, ahead: int) -> None:
        given = self.scheduler.pull("liar", self.scheduler.version + ahead, 48, self.now, newer_available=False)
        assert isinstance(given, Wait)

    @needs(lambda self: self.void)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        grant = data.draw(st.sampled_from(self.void))
        assert self.scheduler.finished(answer(grant, 0, 1.0), self.now) is ResultStatus.LATE

    @needs(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["failed", "released"]))
    def give_up(self, data: st.DataObject, how: str) -> None:
        _, grant = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        if how == "failed":
            self.scheduler.failed(grant.attempt, "timeout", self.now)
        else:
            self.scheduler.released(grant.attempt)

    @rule(session=st.sampled_from(SESSIONS), crashed=st.booleans(), happens=st.integers(0, 2))
    def lose_a_generator(self, session: str, crashed: bool, happens: int) -> None:
        if happens:
            return
        lost = self.scheduler.holder_lost(session, crashed)
        self._forget([lease.grant for lease in lost])

    @rule(delay_s=st.floats(0, TTL_S * 0.7), session=st.none() | st.sampled_from(SESSIONS))
    def let_time_pass(self, delay_s: float, session: str | None) -> None:
        """One generator renews its leases, the others are silent."""
        self.now += delay_s
        for who, grant in list(self.held.values()):
            if who == session:
                self.scheduler.renew(grant.attempt, 1, self.now)
        self._forget([lease.grant for lease in self.scheduler.expire(self.now)])

    # What the server and the learner do

    @needs(lambda self: any(grant.kind is LeaseKind.TRAIN for _, grant in self.held.values()))
    @rule(data=st.data())
    def find_a_prompt_too_long(self, data: st.DataObject) -> None:
        leases = self.scheduler.leases.open
        fresh = [attempt for attempt, lease in leases.items() if not lease.results and attempt in self.held]
        if fresh:
            attempt = data.draw(st.sampled_from(fresh))
            self.scheduler.filtered(attempt, "prompt_too_long")
            self.num_too_long += 1
            self._forget([self.held[attempt][1]])

    @needs(lambda self: self.scheduler.ready)
    @rule()
    def cut(self) -> None:
        self._account(self.scheduler.take(self.now))

    @needs(lambda self: self.scheduler.training is not None)
    @rule(step_s=st.floats(0, 5), skipped=st.integers(0, 9))
    def advance(self, step_s: float, skipped: int) -> None:
        self.now += step_s
        if not skipped:
            self.skipped += self.last_batch
        self.scheduler.advanced(self.scheduler.version + 1, self.now, skipped=not skipped)
        self.last_batch = []

    @needs(lambda self: self.scheduler.evaluation is None)
    @rule(num_prompts=st.integers(1, 3), samples=st.integers(1, 2))
    def evaluate(self, num_prompts: int, samples: int) -> None:
        self.scheduler.evaluate(range(num_prompts), samples)

    @rule()
    def take_the_evaluation(self) -> None:
        result = self.scheduler.take_evaluation()
        if result is not None:
            answers = [one.completion for one in result.trajectories if one.completion]
            assert {span.version for one in answers for span in one.spans} <= {result.version}

    @rule(happens=st.integers(0, 4))
    def restart_the_broker(self, happens: int) -> None:
        """The learner's ledger is that of the last cut: what was skipped since counts as trained in it."""
        if happens:
            return
        old = self.scheduler
        self.num_too_long = self.num_too_long_at_cut
        self.scheduler = Scheduler(self.schedule, Ledger.restore(self.at_cut), old.version, old.training)
        self.held.clear()
        self.void.clear()  # of another epoch: the server refuses them
        self.accepted.clear()
        if old.training is None:
            self.skipped = [prompt for prompt in self.skipped if prompt not in self.at_cut["last_batch"]]

    # What must hold

    @invariant()
    def the_bound_on_open_groups_holds(self) -> None:
        scheduler, size = self.scheduler, self.schedule.prompts_per_step
        opened = scheduler.leases.open.values()
        for d in range(scheduler.version - 4, scheduler.version + 5):
            num_due = sum(lease.grant.deadline <= d for lease in opened)
            assert num_due <= max(0, d - scheduler.next_step + 1) * size, f"N({d})"
        assert len(opened) <= (self.schedule.max_staleness + 1) * size
        assert len(scheduler.leases.remainders) <= size

    @invariant()
    def the_ledger_agrees_with_the_leases(self) -> None:
        ledger, opened = self.scheduler.ledger, self.scheduler.leases.open.values()
        ledger.check()
        counts = ledger.counts()
        assert counts["leased"] == sum(not lease.complete for lease in opened)
        assert counts["finished"] == sum(lease.complete for lease in opened)
        assert len({lease.grant.prompt for lease in opened}) == len(opened), "a prompt is leased twice"
        assert counts["trained"] == len(self.trained) - len(self.skipped)
        num_equal = ledger.filtered["equal_rewards"] if self.schedule.filter_equal_rewards else 0
        assert counts["filtered"] == self.num_too_long + num_equal

    def teardown(self) -> None:
        """From wherever it stands, one honest generator and an honest learner bring the run to its end."""
        if not hasattr(self, "scheduler"):
            return
        for session in SESSIONS:
            self.scheduler.holder_lost(session, crashed=False)
        for _ in range(200):
            if self.scheduler.done or self.scheduler.verdict:
                break
            self._play_honestly()
        else:
            raise AssertionError(f"no end is reached: {describe(self.scheduler, self.now)}")
        if self.scheduler.done and self.scheduler.num_steps_left:
            assert self.scheduler.ledger.num_settled == self.schedule.num_prompts, (
                "the stream ended, prompts are missing"
            )

    def _play_honestly(self) -> None:
        scheduler = self.scheduler
        self.now += 1.0
        given = scheduler.pull("honest", scheduler.version, 50, self.now, newer_available=False)
        for grant in [] if isinstance(given, Wait) else given:
            for sample in range(grant.samples):
                scheduler.finished(answer(grant, sample, float(sample)), self.now)
        scheduler.take_evaluation()
        if scheduler.ready:
            self._account(scheduler.take(self.now))
        elif scheduler.training is not None:
            scheduler.advanced(scheduler.version + 1, self.now)
        elif scheduler.trained_out and not scheduler.done and scheduler.evaluation is None:
            scheduler.evaluate([0])

    def _account(self, batch: Batch) -> None:
        self.last_batch = [group.prompt for group in batch.groups if not group.remainder]
        assert len(self.last_batch) <= self.schedule.prompts_per_step
        for group in batch.groups:
            assert group.trajectories, "a group without trajectories"
            spans = [span for one in group.trajectories if one.completion for span in one.completion.spans]
            assert all(batch.step - span.version >= 0 for span in spans)
            if not group.remainder:
                assert group.prompt not in self.trained, f"prompt {group.prompt} is trained twice"
                assert all(batch.step - span.version <= self.schedule.max_staleness for span in spans)
                assert len(group.trajectories) >= min(2, self.schedule.group_size)
        self.trained += self.last_batch
        self.at_cut, self.num_too_long_at_cut = self.scheduler.ledger.snapshot(), self.num_too_long

    def _forget(self, grants: list[Grant]) -> None:
        for grant in grants:
            self.held.pop(grant.attempt, None)
            if self.scheduler.leases.find(grant.attempt) is None:
                self.void.append(grant)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
