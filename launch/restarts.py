"""What follows when a process ends. Pure; the supervisor does it.

A generator may come and go while training goes on. A dead broker is restarted on its ports and learns the ledger from
the learner; a dead learner rank takes its whole group down, which resumes from the newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from signal import Signals

from launch.plan import ProcessRole
from protocol.errors import Exit

BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)

HOPELESS = frozenset({Exit.SETTINGS, Exit.PREFLIGHT, Exit.RUN_LOCKED, Exit.NO_PROGRESS, Exit.NUMERIC, Exit.REFUSED})
"""Ends that another start would only repeat."""


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do without it. Only generators, and only while another one is left."""


@dataclass(frozen=True, slots=True)
class EndRun:
    code: int
    complete: bool = False  # the run reached its end
    failed: bool = False  # the verdict has to name an error


Fate = Restart | GiveUp | EndRun


def fate(role: ProcessRole, code: int, *, restarts: int, budget: int, others_left: bool) -> Fate:
    """What to do about a process that ended with `code` in the middle of a run, after so many restarts."""
    if role is ProcessRole.LEARNER and code == Exit.DONE:
        return EndRun(Exit.DONE, complete=True)
    if role is ProcessRole.LEARNER and code == Exit.INTERRUPTED:
        return EndRun(Exit.INTERRUPTED)  # drained by somebody else
    is_refused = role is ProcessRole.GENERATOR and code == Exit.REFUSED  # its own matter: the others are not
    if is_refused and others_left:
        return GiveUp()
    if code in HOPELESS and not is_refused:
        return EndRun(code, failed=True)
    if restarts < budget:
        return Restart(BACKOFF_S[min(restarts, len(BACKOFF_S) - 1)])
    if role is ProcessRole.GENERATOR and others_left:
        return GiveUp()
    return EndRun(exit_code(code), failed=True)


def exit_code(code: int) -> int:
    """What the run ends with when a process failed with `code`: its code where that has a meaning, else 1."""
    return code if code in HOPELESS | {Exit.ENGINE_STALLED, Exit.ORPHAN} else 1


def describe_end(code: int) -> str:
    """In words: "was killed by SIGKILL (out of memory?)", "ended with code 70 (engine stalled)"."""
    if code < 0:
        name = Signals(-code).name if -code in set(Signals) else f"signal {-code}"
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    known = next((item.name.lower().replace("_", " ") for item in Exit if item == code), "")
    return f"ended with code {code}" + (f" ({known})" if known else "")
