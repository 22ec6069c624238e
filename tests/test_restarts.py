"""What follows from the end of a process, decided without starting any."""

from __future__ import annotations

import pytest

from launch.plan import ProcessRole
from launch.restarts import EndRun, GiveUp, Restart, fate
from protocol.errors import Exit

GENERATOR, LEARNER, BROKER = ProcessRole.GENERATOR, ProcessRole.LEARNER, ProcessRole.BROKER


@pytest.mark.parametrize("role", [GENERATOR, LEARNER, BROKER])
def test_a_wrong_setting_ends_the_run_at_once(role: ProcessRole) -> None:
    assert fate(role, Exit.SETTINGS, restarts=0, budget=5, others_left=True) == EndRun(Exit.SETTINGS, failed=True)


def test_a_generator_that_is_refused_is_its_own_matter() -> None:
    assert fate(GENERATOR, Exit.REFUSED, restarts=0, budget=5, others_left=True) == GiveUp()
    assert isinstance(fate(GENERATOR, Exit.REFUSED, restarts=0, budget=5, others_left=False), Restart)
    alone = fate(GENERATOR, Exit.REFUSED, restarts=5, budget=5, others_left=False)
    assert alone == EndRun(Exit.REFUSED, failed=True)


def test_a_learner_that_is_refused_ends_the_run() -> None:
    assert fate(LEARNER, Exit.REFUSED, restarts=0, budget=3, others_left=False) == EndRun(Exit.REFUSED, failed=True)


def test_a_crash_is_restarted_until_the_budget_is_spent() -> None:
    assert isinstance(fate(BROKER, -9, restarts=2, budget=3, others_left=False), Restart)
    assert fate(BROKER, -9, restarts=3, budget=3, others_left=False) == EndRun(1, failed=True)
    assert fate(GENERATOR, -9, restarts=5, budget=5, others_left=True) == GiveUp()


def test_the_learner_says_when_a_run_is_over() -> None:
    assert fate(LEARNER, Exit.DONE, restarts=0, budget=3, others_left=False) == EndRun(Exit.DONE, complete=True)
    assert fate(LEARNER, Exit.INTERRUPTED, restarts=0, budget=3, others_left=False) == EndRun(Exit.INTERRUPTED)
