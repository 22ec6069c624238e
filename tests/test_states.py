"""Where a learner's time went: the states' shares of every step add up to 1."""

from __future__ import annotations

import random

import pytest

from learner import states
from learner.states import State, StateClock


class Time:
    """Stands for the module's `time`; moved by the test."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(states, "time", clock)
    return clock


def test_shares_are_the_seconds_in_each_state_over_all_seconds(time: Time) -> None:
    clock = StateClock(lambda state, detail: None)
    time.now += 1
    clock.enter(State.TRAINING)
    time.now += 6
    clock.enter(State.PUBLISHING)
    time.now += 1
    clock.enter(State.TRAINING)
    time.now += 2
    shares, step_s = clock.shares()
    assert step_s == 10.0
    assert shares == {"time/starting": 0.1, "time/training": 0.8, "time/publishing": 0.1}


def test_each_step_is_counted_from_the_end_of_the_one_before(time: Time) -> None:
    clock = StateClock(lambda state, detail: None)
    clock.enter(State.TRAINING)
    time.now += 5
    assert clock.shares()[1] == 5.0
    time.now += 2
    assert clock.shares() == ({"time/training": 1.0}, 2.0)


def test_shares_add_up_to_one_over_any_course_of_states(time: Time) -> None:
    rng = random.Random(5)
    clock = StateClock(lambda state, detail: None)
    for _ in range(50):
        spent = 0.0
        for _ in range(rng.randrange(1, 20)):
            seconds = rng.random() * 10 ** rng.randrange(-6, 4)
            time.now += seconds
            spent += seconds
            clock.enter(rng.choice(list(State)))
        shares, step_s = clock.shares()
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12)
        assert step_s == pytest.approx(spent)


def test_no_time_at_all_has_no_shares(time: Time) -> None:
    clock = StateClock(lambda state, detail: None)
    assert clock.shares() == ({}, 0.0)


def test_every_state_is_told_once_with_its_detail(time: Time) -> None:
    told: list[tuple[str, str]] = []
    clock = StateClock(lambda state, detail: told.append((state, detail)))
    clock.enter(State.WAITING_FOR_TRAJECTORIES, "of step 3")
    clock.enter(State.TRAINING)
    assert told == [("waiting_for_trajectories", "of step 3"), ("training", "")]


def test_asking_for_shares_does_not_tell_the_state_again(time: Time) -> None:
    """Telling it would make it look new: since when a learner waits is what the console shows."""
    told: list[tuple[str, str]] = []
    clock = StateClock(lambda state, detail: told.append((state, detail)))
    clock.enter(State.TRAINING, "step 3")
    clock.shares()
    assert told == [("training", "step 3")]
