"""The schedule as others see it: what the learner waits for, who holds what since when, and why who waits.

Part of the broker process; pure. Read by the status, by the watchdog's log and by the answer to a waiting learner.
"""

from __future__ import annotations

import math
from typing import Any

from broker.batches import each_num_due
from broker.scheduler import Scheduler


def learner_waits_for(scheduler: Scheduler) -> str:
    """What the next batch lacks; "" while a step is in training, or nothing is lacking."""
    if scheduler.training is not None or scheduler.ready or scheduler.trained_out:
        return ""
    opened, step = scheduler.leases.open.values(), scheduler.next_step
    num_finished = scheduler.leases.num_finished.total()
    due = [lease.grant.prompt for lease in opened if lease.grant.deadline == step and not lease.complete]
    must = f"; no later step may train prompts {due[:8]}, which still run" if due else ""
    return f"{num_finished} of {scheduler.settings.prompts_per_step} groups finished, {len(opened)} open{must}"


def describe(scheduler: Scheduler, now: float) -> dict[str, Any]:
    """The whole of it, as plain values."""
    leases, pace, evaluation = scheduler.leases, scheduler.pace, scheduler.evaluation
    steps = range(scheduler.next_step, scheduler.last_deadline + 1)
    num_due = zip(steps, each_num_due(leases.num_open, steps), strict=True)  # N(d)
    limit = pace.limit(scheduler.waited_s(now))
    return {
        "version": scheduler.version,
        "training": scheduler.training,
        "learner_waits_for": learner_waits_for(scheduler),
        "open_by_deadline": {str(step): num for step, num in num_due},
        "open_limit": limit if math.isfinite(limit) else None,
        "group_latency_s": pace.latency_s.value,
        "step_s": pace.step_s.value,
        "remainders": len(leases.remainders),
        "lost_samples": scheduler.groups.num_lost_samples,
        "evaluation": (evaluation.version, evaluation.num_missing) if evaluation else None,
        "generators": {g.session: g.describe(now) for g in leases.generators.values()},
    }
