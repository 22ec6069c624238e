"""What pacing may never do, whatever was measured: hold back a batch, guess, or turn the fastest generator away."""

from __future__ import annotations

import random
from statistics import median_high

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from broker.batches import ScheduleSettings
from broker.leases import REMEMBERED_LATENCIES, Refusal, Wait
from broker.ledger import Ledger
from broker.outlook import describe
from broker.scheduler import PROBE_EVERY_S, Scheduler
from tests.simulation.generator import answer

SESSIONS = ("a", "b", "c")
TIMES_S = st.sampled_from([0.0, 1e-9, 0.001, 0.5, 1.0, 20.0, PROBE_EVERY_S, 1e5]) | st.floats(0, 100)


class PacingMachine(RuleBasedStateMachine):
    """Groups and steps take any time. What was measured is noted here once more."""

    @initialize(size=st.integers(1, 4), bound=st.integers(0, 6), margin=st.floats(0, 3), filters=st.booleans())
    def start(self, size: int, bound: int, margin: float, filters: bool) -> None:
        self.schedule = ScheduleSettings(
            prompts_per_step=size,
            group_size=2,
            steps=10_000,
            max_staleness=bound,
            lease_ttl_s=1e9,
            pacing_margin=margin,
            filter_equal_rewards=filters,
        )
        self.scheduler = Scheduler(self.schedule, Ledger())
        self.now = 0.0
        self.latencies: dict[str, list[float]] = {}  # by session, while it lives: of its groups, in order
        self.num_groups = 0
        self.leased_at: dict[str, float] = {}  # its newest lease
        self.num_steps = 0

    @rule(session=st.sampled_from(SESSIONS), room=st.integers(2, 20), wait_s=TIMES_S)
    def pull(self, session: str, room: int, wait_s: float) -> None:
        self.now += wait_s
        scheduler, size = self.scheduler, self.schedule.prompts_per_step
        given = scheduler.pull(session, scheduler.version, room, self.now, newer_available=False)
        if not isinstance(given, Wait):
            self.leased_at[session] = self.now
        reason = scheduler.leases.generators[session].waiting
        if reason is Refusal.PACING:
            assert len(scheduler.leases.open) >= size, "pacing holds back a batch"
            assert self.num_groups, "pacing by latencies that were not measured"
            assert self.num_steps, "pacing by steps that were not measured"
        if reason is Refusal.SLOW:
            own = self._usual(session)
            assert any(self._usual(other) < own for other in self.latencies if other != session), "it is the fastest"
            assert self.now - self.leased_at[session] < PROBE_EVERY_S, "no probe for a minute"

    def _usual(self, session: str) -> float:
        return median_high(self.latencies[session][-REMEMBERED_LATENCIES:])

    @rule(seed=st.integers(0, 1 << 32), rounds=st.integers(1, 12))
    def work_smoothly(self, seed: int, rounds: int) -> None:
        """Each generator at its own speed, as long as there is something to do."""
        chance = random.Random(seed)
        usual_s = {session: 10 ** chance.uniform(-1, 1.5) for session in SESSIONS}
        for _ in range(rounds):
            session = chance.choice(SESSIONS)
            self.pull(session, chance.randint(2, 20), wait_s=0.0)
            self.finish(session, usual_s[session], chance.randint(1, 8), equal=False)
            self.train(chance.uniform(0.0, 0.5))

    @rule(session=st.sampled_from(SESSIONS), latency_s=TIMES_S, number=st.integers(1, 8), equal=st.booleans())
    def finish(self, session: str, latency_s: float, number: int, equal: bool) -> None:
        """The oldest groups of one generator, after a while."""
        self.now += latency_s
        generator = self.scheduler.leases.generators.get(session)
        for lease in list(generator.running.values())[:number] if generator else []:
            for sample in range(2):
                reward = 0.0 if equal else float(sample)
                self.scheduler.finished(answer(lease.grant, sample, reward), self.now)
            self.latencies.setdefault(session, []).append(self.now - lease.granted_at)
            self.num_groups += 1

    @rule(step_s=TIMES_S)
    def train(self, step_s: float) -> None:
        if self.scheduler.ready:
            self.scheduler.take(self.now)
            self.now += step_s
            self.scheduler.advanced(self.scheduler.version + 1, self.now)
            self.num_steps += 1

    @rule(session=st.sampled_from(SESSIONS))
    def lose_a_generator(self, session: str) -> None:
        self.scheduler.holder_lost(session, crashed=False)
        self.latencies.pop(session, None)
        self.leased_at.pop(session, None)

    def teardown(self) -> None:
        """One generator alone, however slow, keeps the learner going."""
        if not hasattr(self, "scheduler") or self.scheduler.verdict:
            return
        for session in SESSIONS:
            self.lose_a_generator(session)
        for _ in range(5):
            version = self.scheduler.version
            self.pull("a", 100, 0.0)
            self.finish("a", 1000.0, 100, equal=False)
            self.train(1.0)
            assert self.scheduler.version == version + 1, f"no batch: {describe(self.scheduler, self.now)}"


TestPacingMachine = PacingMachine.TestCase
TestPacingMachine.settings = settings(max_examples=60, stateful_step_count=30)
