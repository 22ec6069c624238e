"""A process that was started by the supervisor does not outlive it, however the supervisor ended.

Every main calls `leave_with_parent(os.environ)` first. The supervisor cannot clean up after its own SIGKILL, so its
children watch it; the kernel's parent-death signal is no use here because it fires when the starting *thread* ends.
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
    """Watch the parent that the environment names, if any, from a daemon thread."""
    parent = environ.get(PARENT_VARIABLE, "")
    if parent.isdigit():
        threading.Thread(target=_watch, args=(int(parent),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(Exit.ORPHAN)
