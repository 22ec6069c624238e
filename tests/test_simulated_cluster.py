"""Whole clusters in simulated time: 2,000 schedules with every kind of death, and proof that the simulation notices.

`make simulate` plays ten times as many.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from broker.batches import ScheduleSettings
from broker.leases import Refusal
from tests.simulation.cluster import Cluster
from tests.simulation.random_schedules import cluster_of, play
from tests.simulation.seen import Seen
from tests.simulation.served_broker import ServedBroker
from tests.simulation.world import Load

NUM_SCHEDULES = 2000
STEADY = ScheduleSettings(prompts_per_step=8, group_size=1, steps=80, max_staleness=4)
EVEN = Load(straggler_share=0.0)
REFUSALS = set(Refusal) - {Refusal.NO_VERSION, Refusal.UNKNOWN_VERSION, Refusal.NO_ROOM}  # the desk sees to these


@pytest.fixture(scope="module")
def played() -> tuple[Counter[str], list[str]]:
    """(what was seen, what broke) over all schedules."""
    seen: Counter[str] = Counter()
    failures = []
    for seed in range(NUM_SCHEDULES):
        try:
            seen += play(seed)
        except AssertionError as error:
            failures.append(str(error))
    return seen, failures


@pytest.mark.timeout(400)
def test_thousands_of_schedules_keep_every_promise(played: tuple[Counter[str], list[str]]) -> None:
    """Each asserts the promises as it plays: see tests/promises.py."""
    _, failures = played
    assert not failures, f"{len(failures)} of {NUM_SCHEDULES}:\n" + "\n".join(failures[:5])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kinds", [set(Seen), REFUSALS], ids=["events", "refusals"])
def test_every_kind_of_event_occurs(kinds: set[str], played: tuple[Counter[str], list[str]]) -> None:
    seen, _ = played
    missing = sorted(kind for kind in kinds if not seen[kind])
    assert not missing, f"in {NUM_SCHEDULES} schedules it never happened that {'; that '.join(missing)}"


PLAY_TEN = """
from tests.simulation.random_schedules import cluster_of
for seed in range(200, 210):
    cluster = cluster_of(seed).run()
    print(cluster.now, cluster.trained, cluster.staleness, sorted(cluster.world.seen.items()))
"""


def test_the_same_seed_plays_the_same_run_in_another_process() -> None:
    """Without that, the command that a failure names would show something else."""
    root = str(Path(__file__).parents[1])
    said = set()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        command = [sys.executable, "-c", PLAY_TEN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
        said.add(done.stdout)
    assert len(said) == 1
    assert len(said.pop().splitlines()) == 10


def test_the_simulated_broker_plays_what_the_real_service_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tether.broker"), "disabled", True)
    for seed in range(100):
        simulated = cluster_of(seed).run()
        served = cluster_of(seed, lambda world: ServedBroker(world, tmp_path, monkeypatch)).run()
        assert served.now == simulated.now, f"seed {seed}"
        assert served.trained == simulated.trained, f"seed {seed}"
        assert served.staleness == simulated.staleness, f"seed {seed}"
        assert served.evaluated == simulated.evaluated, f"seed {seed}"
        assert served.world.seen == simulated.world.seen, f"seed {seed}"


def test_poisoned_prompts_are_quarantined_and_nothing_else_is() -> None:
    schedule = replace(STEADY, steps=20, num_prompts=160, lease_ttl_s=6.0)
    cluster = Cluster(schedule, Load(poison=frozenset({3, 40})), seed=1).run()
    assert cluster.quarantined == {3, 40}
    assert sorted(cluster.trained) == [prompt for prompt in range(160) if prompt not in (3, 40)]


def test_at_staleness_zero_every_token_is_of_the_version_that_trains_it() -> None:
    cluster = Cluster(replace(STEADY, max_staleness=0, steps=30), Load(), seed=1).run()
    assert set(cluster.staleness) == {0}


def test_without_faults_the_learner_trains_or_waits_for_generation_and_nothing_else() -> None:
    """That somebody generates or applies weights whenever it waits, `Cluster` asserts after every event."""
    cluster = Cluster(STEADY, EVEN, seed=1).run()
    assert EVEN.calm
    assert cluster.now == pytest.approx(STEADY.steps * EVEN.step_s + cluster.waited_s)
    assert sorted(cluster.trained) == list(range(STEADY.steps * STEADY.prompts_per_step))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_run_whose_groups_are_all_equal_ends_after_four_batches_of_them(size: int) -> None:
    schedule = replace(STEADY, prompts_per_step=size, group_size=2, filter_equal_rewards=True)
    cluster = Cluster(schedule, Load(equal_share=1.0), seed=1).run()
    assert cluster.scheduler.verdict.startswith(f"no signal: {4 * size} groups in a row had equal rewards")
    assert cluster.trained == []


def test_a_run_whose_samples_all_fail_ends_with_the_fourth_bad_prompt() -> None:
    cluster = Cluster(replace(STEADY, group_size=2), Load(error_share=1.0), seed=1).run()
    assert cluster.scheduler.verdict.startswith("4 of 4 prompts failed 3 times each")
    assert len(cluster.quarantined) == 4
