"""Schedules and loads of simulated clusters, drawn at random: a seed is a run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from broker.batches import ScheduleSettings
from protocol.sections import AtBound
from tests.simulation.broker import SimulatedBroker
from tests.simulation.cluster import Cluster
from tests.simulation.world import Load, World

TTL_S = 6.0


def any_settings(random_: random.Random) -> ScheduleSettings:
    size, steps = random_.choice([1, 2, 4]), random_.choice([1, 3, 8, 20])
    group_size = random_.choice([1, 2, 3, 4])
    return ScheduleSettings(
        prompts_per_step=size,
        group_size=group_size,
        steps=steps,
        max_staleness=random_.choice([0, 1, 2, 4]),
        num_prompts=random_.choice([None, size * steps, max(1, size * steps - 1), size * steps // 2 + 1]),
        at_bound=random_.choice(list(AtBound)),
        lease_ttl_s=TTL_S,
        filter_equal_rewards=group_size > 1 and random_.random() < 0.5,
        newest_first=random_.random() < 0.7,
        pacing_margin=random_.choice([None, 0.0, 1.0]),
        gate_slow_generators=random_.random() < 0.7,
        evaluate_at_end=random_.random() < 0.5,
    )


def any_load(random_: random.Random, evaluates: bool) -> Load:
    """One load in ten is without any fault; in the others each fault is off more often than on."""
    calm = random_.random() < 0.1

    def now_and_then(*values: float) -> float:
        return random_.choice(values) if random_.random() < 0.3 and not calm else 0.0

    return Load(
        num_generators=random_.choice([1, 2, 4]),
        groups_at_a_time=random_.choice([1, 2, 6]),
        apply_s=random_.choice([0.0, 0.05, 0.5, 2.0]),
        publish_s=random_.choice([0.0, 0.3]),
        share_s=random_.choice([0.0, 0.2]),
        straggler_share=random_.choice([0.0, 0.05]),
        tail_shape=random_.choice([0.0, 0.0, 1.2]),
        slow_factors=random_.choice([(), (10.0,)]),
        equal_share=random_.choice([0.0, 0.0, 0.0, 0.3, 0.3, 0.9, 1.0]),
        unusable_every=random_.choice([0, 0, 0, 0, 0, 0, 7, 2, 1]),
        error_share=now_and_then(0.02, 0.02, 0.3, 1.0),
        poison=random_.choice([frozenset(), frozenset({0}), frozenset({1, 3})]) if now_and_then(1.0) else frozenset(),
        crash_every_s=now_and_then(5.0, 20.0),
        host_crash_every_s=now_and_then(10.0, 30.0),
        leave_every_s=now_and_then(5.0, 20.0),
        silence_every_s=now_and_then(5.0, 20.0),
        lag_every_s=now_and_then(3.0, 10.0),
        restart_s=random_.choice([0.0, 2.0]),
        lost_grant_share=now_and_then(0.05, 0.3),
        failed_lease_share=now_and_then(0.02, 0.2),
        released_lease_share=now_and_then(0.02, 0.2),
        delayed_share=now_and_then(0.1, 0.5),
        repeated_share=now_and_then(0.1, 0.5),
        zombie_share=random_.choice([0.0, 0.5, 1.0]),
        broker_restart_every_s=now_and_then(3.0, 7.0),
        broker_dies_share=now_and_then(0.05, 0.3),
        broker_down_s=random_.choice([0.0, 3.0]),
        learner_crash_every_s=now_and_then(5.0, 15.0),
        second_resume_share=random_.choice([0.0, 0.5]),
        older_checkpoint_share=random_.choice([0.0, 0.5]),
        skipped_share=now_and_then(0.1, 0.5),
        checkpoint_every=random_.choice([1, 3]),
        evaluate_every=random_.choice([1, 3]) if evaluates else 0,
    )


def cluster_of(seed: int, new_broker: Callable[[World], Any] = SimulatedBroker) -> Cluster:
    random_ = random.Random(seed)
    settings = any_settings(random_)
    return Cluster(settings, any_load(random_, settings.evaluate_at_end), seed, new_broker)


def play(seed: int) -> Counter[str]:
    """Plays one schedule, and returns what was seen. Raises AssertionError that says how to play it again."""
    cluster = cluster_of(seed)
    try:
        cluster.run()
    except Exception as error:
        again = f'make simulate FIRST={seed} ARGS="--count 1"'
        what = f"{type(error).__name__}: {error}"
        raise AssertionError(f"seed {seed}, {cluster.now:.2f} s simulated: {what}\nagain: {again}") from error
    return cluster.world.seen
