"""The lease table under every order of events, against a diary: each fact is looked up in all that ever happened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median_high

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.leases import REMEMBERED_LATENCIES, Generator, Grant, LeaseTable
from protocol.types import LeaseKind
from tests.simulation.generator import answer

SESSIONS = ("a", "b", "c")
TTL_S = 10.0


@dataclass
class Entry:
    """One lease as the diary has it."""

    grant: Grant
    holder: str
    granted_at: float
    renewed_at: float
    samples_in: set[int] = field(default_factory=set)
    handed_over: set[int] = field(default_factory=set)
    place: str = "open"  # or "aside", or "closed"

    @property
    def runs(self) -> bool:
        return self.place != "closed" and len(self.samples_in) < self.grant.samples


@dataclass
class Known:
    """One generator as the diary has it."""

    room: int
    heard_at: float
    leased: list[int] = field(default_factory=list)  # samples of every lease since its last pull
    latencies: list[float] = field(default_factory=list)


class LeaseMachine(RuleBasedStateMachine):
    """Plays scheduler and generators, the ones that vanish included."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(TTL_S)
        self.now = 0.0
        self.diary: dict[int, Entry] = {}  # by attempt
        self.known: dict[str, Known] = {}  # by session

    @rule(session=st.sampled_from(SESSIONS), version=st.integers(-1, 3), room=st.integers(0, 9))
    def pull(self, session: str, version: int, room: int) -> None:
        self.table.generators.setdefault(session, Generator(session)).pulls(version, room, self.now)
        before = self.known.get(session)
        self.known[session] = Known(room, self.now, latencies=before.latencies if before else [])

    @rule(
        data=st.data(),
        kind=st.sampled_from(LeaseKind),
        samples=st.integers(1, 4),
        deadline=st.integers(0, 2),
        alone=st.booleans(),
    )
    def hand_out(self, data: st.DataObject, kind: LeaseKind, samples: int, deadline: int, alone: bool) -> None:
        if not self.known:
            return
        session = data.draw(st.sampled_from(sorted(self.known)))
        attempt = self.table.new_attempt()
        assert all(attempt > earlier for earlier in self.diary), f"attempt {attempt} is not a new one"
        grant = Grant(kind, len(self.diary), attempt, samples, 0, deadline, alone=alone)
        assert self.table.hand_out(grant, self.table.generators[session], self.now) is grant
        place = "aside" if kind is LeaseKind.EVALUATE else "open"
        self.diary[attempt] = Entry(grant, session, self.now, self.now, place=place)
        self.known[session].leased.append(samples)

    @rule(data=st.data(), number=st.integers(1, 4))
    def samples_come_in(self, data: st.DataObject, number: int) -> None:
        if not (running := [attempt for attempt, entry in self.diary.items() if entry.runs]):
            return
        attempt = data.draw(st.sampled_from(running))
        for _ in range(min(number, self.diary[attempt].grant.samples - len(self.diary[attempt].samples_in))):
            self._sample_comes_in(attempt)

    def _sample_comes_in(self, attempt: int) -> None:
        entry, lease = self.diary[attempt], self.table.find(attempt)
        assert lease is not None
        sample = min(set(range(entry.grant.samples)) - entry.samples_in)
        lease.results[sample] = answer(entry.grant, sample, 1.0, error="" if sample else "no answer")
        entry.samples_in.add(sample)
        self.renew(attempt)
        if lease.complete:
            self.table.answered(lease, self.now)
            if entry.holder in self.known:
                self.known[entry.holder].latencies.append(self.now - entry.granted_at)

    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        if held := [attempt for attempt, entry in self.diary.items() if entry.place != "closed"]:
            self.renew(data.draw(st.sampled_from(held)))

    def renew(self, attempt: int) -> None:
        lease, entry = self.table.find(attempt), self.diary[attempt]
        assert lease is not None
        self.table.renew(lease, self.now)
        entry.renewed_at = self.now
        if entry.holder in self.known:
            self.known[entry.holder].heard_at = self.now

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if held := [attempt for attempt, entry in self.diary.items() if entry.place != "closed"]:
            self._close(data.draw(st.sampled_from(held)))

    @rule()
    def split(self) -> None:
        """A batch takes what the oldest running group has; at least one sample, or there is nothing to take."""
        for attempt, entry in list(self.diary.items()):
            if entry.runs and entry.place == "open" and entry.grant.samples > 1:
                if not entry.samples_in:
                    self._sample_comes_in(attempt)
                lease = self.table.find(attempt)
                assert lease is not None
                self.table.set_aside(lease)
                entry.place, entry.handed_over = "aside", set(entry.samples_in)
                return

    @rule(session=st.sampled_from(SESSIONS))
    def a_generator_is_gone(self, session: str) -> None:
        if session in self.known:
            for attempt in list(self.table.generators[session].running):
                self._close(attempt)
            del self.table.generators[session], self.known[session]

    @rule(delay_s=st.sampled_from([0.0, 1.0, TTL_S / 2, TTL_S]))
    def time_passes(self, delay_s: float) -> None:
        self.now += delay_s

    def _close(self, attempt: int) -> None:
        lease = self.table.find(attempt)
        assert lease is not None
        self.table.close(lease)
        self.diary[attempt].place = "closed"

    @invariant()
    def every_lease_lies_where_the_diary_says(self) -> None:
        for place, found in (("open", self.table.open), ("aside", self.table.aside)):
            assert sorted(found) == [attempt for attempt, entry in self.diary.items() if entry.place == place]
        for attempt, entry in self.diary.items():
            lease = self.table.find(attempt)
            assert (lease is None) == (entry.place == "closed")
            if lease is not None:
                assert (lease.grant, lease.holder, lease.complete) == (entry.grant, entry.holder, not entry.runs)
                assert [one.sample for one in lease.good] == sorted(entry.samples_in - {0})
                assert lease.errors == ["no answer"] * (0 in entry.samples_in)
        aside = [entry for entry in self.diary.values() if entry.place == "aside"]
        remainders = [(entry.grant.attempt, entry.handed_over) for entry in aside if entry.handed_over]
        assert [(lease.grant.attempt, set(lease.handed_over)) for lease in self.table.remainders] == remainders
        evaluations = [entry.grant for entry in aside if entry.grant.kind is LeaseKind.EVALUATE]
        assert [lease.grant for lease in self.table.evaluations] == evaluations

    @invariant()
    def what_is_open_and_finished_is_counted_by_deadline(self) -> None:
        opened = [entry for entry in self.diary.values() if entry.place == "open"]
        assert self.table.num_open == Counter(entry.grant.deadline for entry in opened)
        assert self.table.num_finished == Counter(entry.grant.deadline for entry in opened if not entry.runs)

    @invariant()
    def every_generator_owes_what_the_diary_says(self) -> None:
        assert sorted(self.table.generators) == sorted(self.known)
        for session, known in self.known.items():
            generator = self.table.generators[session]
            owed = [e for e in self.diary.values() if e.runs and e.holder == session]
            assert sorted(generator.running) == [entry.grant.attempt for entry in owed]
            room = max(0, known.room - sum(known.leased))
            assert generator.room == room
            assert generator.capacity == room + sum(entry.grant.samples - len(entry.samples_in) for entry in owed)
            assert generator.evaluates == any(entry.grant.kind is LeaseKind.EVALUATE for entry in owed)
            assert generator.runs_alone == any(entry.grant.alone for entry in owed)
            for samples in range(1, 10):
                assert generator.has_room_for(samples) == (samples <= room or (room > 0 and not owed))
            latest = known.latencies[-REMEMBERED_LATENCIES:]
            assert generator.latency_s == (median_high(latest) if latest else None)

    @invariant()
    def silence_is_a_whole_time_to_live_without_a_word(self) -> None:
        silent = [session for session, known in self.known.items() if self.now - known.heard_at >= TTL_S]
        assert sorted(generator.session for generator in self.table.silent(self.now)) == sorted(silent)
        late = [
            a for a, e in self.diary.items() if e.runs and e.holder in self.known and self.now - e.renewed_at >= TTL_S
        ]
        assert sorted(lease.grant.attempt for lease in self.table.expired(self.now)) == late


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=80, stateful_step_count=40)
