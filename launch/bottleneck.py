"""Which side of a run holds the other up, and the flag that would move it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from protocol.config import Config

NOTICEABLE = 0.15
"""A side that waits for a smaller share of its time is busy."""

WAITING_STATES = ("waiting", "paused", "idle")


def is_waiting(state: str) -> bool:
    """Whether a process in this state stands still for the sake of another."""
    return state.startswith(WAITING_STATES) and state != "waiting_for_ranks"


def bottleneck(waiting: Mapping[str, float], config: Config, cores: int) -> str:
    """One sentence, from the share of its recent time that each process waited. `cores`: here; 0: not known."""
    learner = waiting.get("learner-0")
    generators = [share for name, share in waiting.items() if name.startswith("generator")]
    if learner is None or not generators:
        return "not known yet"
    idle = sum(generators) / len(generators)
    seen = f"learner waits {learner:.0%}, generators {idle:.0%} of their time"
    if max(learner, idle) < NOTICEABLE:
        return f"none ({seen})"
    if config.staleness.max == 0 and learner >= NOTICEABLE and idle >= NOTICEABLE:
        return f"the synchronous algorithm ({seen}) -> try --max-staleness 1"
    on_cpu, count = config.run.device == "cpu", config.generators.count
    if learner > idle:
        if on_cpu and cores and config.learner.ranks + count >= cores:
            return f"generation ({seen}); all {cores} cores are in use"
        return f"generation ({seen}) -> try --generators {count + 1}"
    if not on_cpu:
        return f"the learner ({seen}) -> try --learner-gpus {config.learner.ranks + 1}"
    return f"the learner ({seen})" + (f" -> try --generators {count - 1}" if count > 1 else "")
