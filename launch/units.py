"""Processes that live and die together: the learner's ranks, or a single one. Starts, signals and buries them.

Each process has its own session, so a Ctrl-C reaches the supervisor alone and a kill reaches everything that it started
and that stayed in its session; and its own log, to which a restart appends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.logs import first_error, last_line, read_from
from launch.plan import Process, ProcessRole
from launch.restarts import describe_end
from protocol.errors import Exit
from protocol.parent import PARENT_VARIABLE

KILL_S = 1.5
"""How long the kernel may take to end a killed process."""


@dataclass(slots=True, eq=False)
class Child:
    """One process of a unit, started or not."""

    process: Process
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    log_start: int = 0  # where the log of this start begins

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.returncode is None

    def obituary(self, code: int) -> str:
        """For example: generator-0 was killed by SIGSEGV: <its first error> (log: ...)."""
        log = read_from(self.log, self.log_start)
        error = first_error(log) or (last_line(log) if code >= 0 else "")  # who was killed had no last words
        return f"{self.process.name} {describe_end(code)}{': ' + error if error else ''} (log: {self.log})"


@dataclass(slots=True, eq=False)
class Unit:
    """`restart_at` set: it is down until then. `given_up`: it stays down."""

    role: ProcessRole
    children: list[Child]
    budget: int
    restarts: int = 0
    restart_at: float | None = None
    given_up: bool = False

    @property
    def alive(self) -> bool:
        return any(child.alive for child in self.children)

    def start(self, environ: Mapping[str, str]) -> None:
        """Start every process; a learner that was started before is told to resume."""
        self.restart_at = None
        for child in self.children:
            argv = list(child.process.argv)
            if self.role is ProcessRole.LEARNER and self.restarts and "--resume" not in argv:
                argv.append("--resume")
            env = {**environ, **child.process.env, PARENT_VARIABLE: str(os.getpid())}
            if "PYTHONPATH" in environ and "PYTHONPATH" in child.process.env:
                env["PYTHONPATH"] = f"{child.process.env['PYTHONPATH']}{os.pathsep}{environ['PYTHONPATH']}"
            with child.log.open("ab") as log:
                child.log_start = log.tell()
                child.popen = subprocess.Popen(
                    argv,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def ended(self) -> tuple[Child, int] | None:
        """Whose end is the unit's end, with its code: the first that ended badly, or any once all have ended well."""
        codes = [child.popen.poll() if child.popen else None for child in self.children]
        ends = [(child, code) for child, code in zip(self.children, codes, strict=True) if code is not None]
        bad = [end for end in ends if end[1] not in (Exit.DONE, Exit.INTERRUPTED)]
        if bad:
            return min(bad, key=lambda end: end[0].log.stat().st_mtime)  # who went silent first has failed first
        return ends[0] if len(ends) == len(self.children) else None

    def terminate(self) -> None:
        """Ask everybody who is left to leave."""
        for child in self.children:
            if child.popen is not None and child.alive:
                _signal_session(child.popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The unit's sessions are gone after this, also what their leaders left behind."""
        started = [child.popen for child in self.children if child.popen is not None]
        for popen in started:
            _signal_session(popen.pid, signal.SIGKILL)
        for popen in started:
            with contextlib.suppress(subprocess.TimeoutExpired):  # held by the kernel: no signal reaches it
                popen.wait(timeout=KILL_S)


def _signal_session(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
