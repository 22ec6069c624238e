"""Starts a plan's processes, watches them, restarts what may be restarted, and leaves nothing behind.

Runs in `launch/cluster.py`, which calls `tick` a few times a second until it gives a verdict; who holds a Supervisor
starts no other children meanwhile.

That no process outlives the run rests on `_clear`: every session is killed as a group, and because this process is the
subreaper of all it started, whatever left its group becomes our child and is found there. A SIGKILL of this process
itself is answered by the children (`protocol/parent.py`). What follows from an end is decided in `launch/restarts.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from launch.plan import Plan, Process, ProcessRole
from launch.restarts import EndRun, GiveUp, Restart, exit_code, fate
from launch.units import Child, Unit
from protocol.errors import Exit

PR_SET_CHILD_SUBREAPER = 36
RESTARTS = 3
"""Of the broker, and of the learner's group."""
TERM_S = 10.0
"""From SIGTERM to SIGKILL."""
CLEAR_S = 1.5
"""How long the final sweep may take: the second Ctrl-C promises 2 s in all."""


class Phase(StrEnum):
    RUNNING = "running"
    DRAINING = "draining"  # the learner was asked to end by itself
    STOPPING = "stopping"  # SIGTERM has been sent, SIGKILL is near
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the run ended, in one sentence, and what this program exits with."""

    code: int
    text: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as the console shows it."""

    name: str
    role: ProcessRole
    device: str
    state: str
    restarts: int


@dataclass(slots=True, eq=False)
class Supervisor:
    """`start`, then `tick` until it returns a verdict; `interrupt` at every Ctrl-C; `close` in any case."""

    plan: Plan
    log_dir: Path
    environ: Mapping[str, str]
    drain_s: float
    generator_restarts: int
    drain: Callable[[], None]
    """Asks the broker to end the run in order; must not block."""
    tell: Callable[[str], None]
    """Takes one line for the user."""
    phase: Phase = Phase.RUNNING
    _units: list[Unit] = field(default_factory=list)
    _foreign: set[int] = field(default_factory=set)
    _interrupts: int = 0
    _obeyed: int = 0
    _broker_told: bool = False
    _deadline: float = 0.0
    _verdict: Verdict | None = None

    def start(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._foreign = {child.pid for child in psutil.Process().children()}
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._units = [self._unit(self.plan.of(ProcessRole.BROKER), RESTARTS)]
        self._units.append(self._unit(self.plan.of(ProcessRole.LEARNER), RESTARTS))
        self._units += [self._unit((p,), self.generator_restarts) for p in self.plan.of(ProcessRole.GENERATOR)]
        for unit in self._units:
            unit.start(self.environ)

    def tick(self) -> Verdict | None:
        """Notice what happened and act on it; the verdict once everything is gone."""
        now = time.monotonic()
        if self._interrupts > self._obeyed:
            self._obey(now)
        for unit in self._units:
            if unit.restart_at is None and not unit.given_up:
                self._watch(unit, now)
            elif unit.restart_at is not None and now >= unit.restart_at and self.phase is Phase.RUNNING:
                unit.start(self.environ)
        if self.phase is Phase.DRAINING and now >= self._deadline:
            self._stop(
                Verdict(Exit.INTERRUPTED, f"interrupted: the learner did not end within {self.drain_s:.0f} s"), now
            )
        if self.phase is Phase.STOPPING:
            self._see_off(now)
        return self._verdict if self.phase is Phase.ENDED else None

    def interrupt(self) -> None:
        """The user wants out: first in order, the second time at once. For signal handlers; `tick` obeys."""
        self._interrupts += 1

    def close(self) -> None:
        """Nothing that was started is left after this."""
        for unit in self._units:
            unit.kill()
        self._clear()
        self.phase = Phase.ENDED

    def processes(self) -> list[Seen]:
        return [
            Seen(child.process.name, unit.role, child.process.device, self._state(unit, child), unit.restarts)
            for unit in self._units
            for child in unit.children
        ]

    def _obey(self, now: float) -> None:
        at_once = self._interrupts > self._obeyed + 1 or self.phase is not Phase.RUNNING
        self._obeyed = self._interrupts
        if at_once:
            self._verdict = self._verdict or Verdict(Exit.INTERRUPTED, "interrupted at once")
            self.close()
        elif not all(unit.alive for unit in self._units if unit.role is not ProcessRole.GENERATOR):
            self._stop(Verdict(Exit.INTERRUPTED, "interrupted while a process was down"), now)
        else:
            self.phase, self._deadline = Phase.DRAINING, now + self.drain_s
            how = "running work ends and a checkpoint is written"
            self.tell(f"ending in order within {self.drain_s:.0f} s: {how}; Ctrl-C again leaves at once")
            self.drain()

    def _watch(self, unit: Unit, now: float) -> None:
        """Act on the end of a unit."""
        end = unit.ended()
        if end is None or self.phase in (Phase.STOPPING, Phase.ENDED):
            return
        child, code = end
        unit.kill()
        self._clear()
        if self.phase is Phase.DRAINING:
            self._ended_while_draining(unit, child, code, now)
            return
        others_left = any(u.role is unit.role and u is not unit and not u.given_up for u in self._units)
        follows = fate(unit.role, code, restarts=unit.restarts, budget=unit.budget, others_left=others_left)
        if isinstance(follows, EndRun):
            self._stop(Verdict(follows.code, child.obituary(code) if follows.failed else _how(follows)), now)
        elif isinstance(follows, GiveUp):
            unit.given_up = True
            self.tell(f"{child.obituary(code)}; {unit.restarts} restarts were made, going on without it")
        elif isinstance(follows, Restart):
            unit.restart_at, unit.restarts = now + follows.after_s, unit.restarts + 1
            self.tell(f"{child.obituary(code)}; restart {unit.restarts} of {unit.budget} in {follows.after_s:g} s")

    def _ended_while_draining(self, unit: Unit, child: Child, code: int, now: float) -> None:
        if unit.role is ProcessRole.GENERATOR:
            unit.given_up = True
        elif unit.role is ProcessRole.LEARNER and code in (Exit.DONE, Exit.INTERRUPTED):
            self._stop(Verdict(code, _how(EndRun(code, complete=code == Exit.DONE))), now)
        else:
            self._stop(Verdict(exit_code(code), f"interrupted, and {child.obituary(code)}"), now)

    def _stop(self, verdict: Verdict, now: float) -> None:
        """The verdict stands; everybody may leave in order for a while."""
        self._verdict, self.phase, self._deadline = verdict, Phase.STOPPING, now + TERM_S
        for unit in self._units:
            if unit.role is not ProcessRole.BROKER:
                unit.terminate()

    def _see_off(self, now: float) -> None:
        """The broker leaves last: the others say goodbye to it."""
        left = [unit for unit in self._units if unit.alive]
        if not left or now >= self._deadline:
            self.close()
        elif [unit.role for unit in left] == [ProcessRole.BROKER] and not self._broker_told:
            self._broker_told = True
            left[0].terminate()

    def _unit(self, processes: tuple[Process, ...], budget: int) -> Unit:
        children = [Child(process, self.log_dir / f"{process.name}.log") for process in processes]
        return Unit(processes[0].role, children, budget)

    def _clear(self) -> None:
        """Kill whatever left its session: orphans of ours are our children, because we are their subreaper."""
        deadline = time.monotonic() + CLEAR_S
        while time.monotonic() < deadline:
            ours = {child.popen.pid for unit in self._units for child in unit.children if child.popen is not None}
            strays = [child for child in psutil.Process().children() if child.pid not in ours | self._foreign]
            if not strays:
                return
            for stray in strays:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in [*stray.children(recursive=True), stray]:
                        process.kill()
            psutil.wait_procs(strays, timeout=0.2)

    def _state(self, unit: Unit, child: Child) -> str:
        if unit.given_up:
            return "given up"
        if unit.restart_at is not None:
            return f"down, restart in {max(0.0, unit.restart_at - time.monotonic()):.0f} s"
        code = child.popen.returncode if child.popen else None
        return "running" if code is None else f"ended ({code})"


def _how(end: EndRun) -> str:
    return "the run is complete" if end.complete else "interrupted: the run ended in order and can be resumed"
