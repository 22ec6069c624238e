"""No process outlives the one that started it, however that one ended.

Mains call `leave_with_parent(os.environ)` first; vLLM's engine core and the reward workers call `leave_with`. A killed
parent cannot clean up, so its children watch it. Polled: the kernel's parent-death signal is no use here because it
fires when the starting *thread* ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping

from protocol.errors import Exit

PARENT_VARIABLE = "TETHER_PARENT_PID"
POLL_S = 0.5


def leave_with_parent(environ: Mapping[str, str]) -> None:
    """Leave with the parent that the environment names, if it names one."""
    parent = environ.get(PARENT_VARIABLE, "")
    if parent.isdigit():
        leave_with(int(parent))


def leave_with(parent: int) -> None:
    """Watch `parent` from a daemon thread, and end this process at once when it is gone."""
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(Exit.ORPHAN)
