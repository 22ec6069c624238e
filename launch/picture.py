"""What is known of a run at one moment, and what each process does. Pure; the console draws it.

Whatever a peer wrote is made printable here: states, details and names may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from launch.chart import printable
from launch.history import Row
from launch.supervisor import Seen
from protocol.config import Config

RECENT_STEPS = 20
SILENT_S = 10.0

WHY = {
    "at_bound": "at the staleness bound",
    "pacing": "more groups would only be staler",
    "slow": "too slow for the others",
    "too_old": "its version is too old",
    "newer_version": "newer weights come first",
    "no_version": "no weights yet",
    "no_room": "no room for a group",
    "end_of_data": "all prompts are leased",
    "alone": "a prompt runs alone",
    "evaluation": "the others' evaluation",
    "stopped": "the run ends",
}
"""The broker's reasons for giving no lease, as they complete "waiting: ..." and "generating (...)"."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that one frame is drawn from."""

    name: str
    config: Config
    processes: Sequence[Seen]  # ours, as the supervisor sees them
    steps: Sequence[Row] = ()
    warmup: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    status: Mapping[str, Any] = field(default_factory=dict)  # the broker's answer; empty while it gives none
    rates: Mapping[str, float] = field(default_factory=dict)  # tokens per second by generator
    waiting: Mapping[str, float] = field(default_factory=dict)  # recent share of its time that each process waited
    met: frozenset[str] = frozenset()  # processes that the broker has ever told us of
    run_dir: str = ""
    cores: int = 0  # of this machine; 0: not known


@dataclass(frozen=True, slots=True)
class Doing:
    """One process and what it does."""

    name: str
    device: str
    state: str
    for_s: float
    rate: float | None
    version: int | None


def doings(picture: Picture) -> Iterator[Doing]:
    """Every process, ours and those that joined from elsewhere."""
    answered = {process["name"]: process for process in picture.status.get("processes", ())}
    for seen in picture.processes:
        if seen.role == "broker":
            version = picture.status.get("version")
            yield Doing("broker", seen.device, _broker_state(seen, picture), 0.0, None, version)
        else:
            yield _doing(seen.name, seen.device, seen.state, answered.pop(seen.name, None), picture)
    for name, process in answered.items():
        yield _doing(printable(name), "elsewhere" if picture.processes else "", "running", process, picture)


def _doing(name: str, device: str, state: str, answer: Mapping[str, Any] | None, picture: Picture) -> Doing:
    if state != "running" or answer is None:
        alone = "has left the broker" if name in picture.met and picture.status else "starting"
        return Doing(name, device, alone if state == "running" else state, 0.0, None, None)
    doing = _in_words(printable(answer["state"]).replace("_", " "), answer["detail"])
    if answer["seen_s"] > SILENT_S:
        doing = f"silent for {duration(answer['seen_s'])}, was {doing}"
    version = answer["version"] if answer["role"] == "generator" else picture.status.get("version")
    return Doing(name, device, doing, answer["for_s"], picture.rates.get(name), version)


def _in_words(state: str, detail: str) -> str:
    """A state and what it is about. Who generates may wait for further leases: that is said, but is no waiting."""
    if detail in WHY and state == "generating":
        return f"generating ({WHY[detail]})"
    if detail.startswith("of "):
        return f"{state} {printable(detail)}"
    return f"{state}: {WHY.get(detail, printable(detail))}" if detail else state


def _broker_state(seen: Seen, picture: Picture) -> str:
    if seen.state != "running" or not picture.status:
        return "starting" if seen.state == "running" else seen.state
    return printable(str(picture.status.get("verdict") or picture.status["phase"]))


def seconds_per_step(steps: Sequence[Row]) -> float | None:
    """Mean over the recent steps, without a run's first, which waits for the generators; None before the second."""
    times = [row["throughput/step_s"] for row in steps[1:][-RECENT_STEPS:] if row.get("throughput/step_s") is not None]
    return fmean(times) if times else None


def duration(seconds: float) -> str:
    """4 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"


def num_steps(picture: Picture) -> int:
    return int(picture.status.get("num_steps") or picture.config.run.steps)


def steps_done(picture: Picture) -> int:
    return int(picture.steps[-1]["step"]) + 1 if picture.steps else 0


def left_s(picture: Picture, pace: float) -> float:
    return max(0, num_steps(picture) - steps_done(picture)) * pace
