"""Finds code that blocks the generator's event loop: nothing else in it, heartbeats included, goes on meanwhile.

A thread of the generator process. It asks the loop for a sign of life; when none comes and the rollout's own file is
on the loop's stack, the log says which line stands still, and past a limit the process is ended: it would otherwise
hold its leases and its device in silence. That it blames nobody else rests on `_culprit`. A loop that stands still for
another reason, or because code keeps the interpreter to itself so that not even this thread runs, ends the process all
the same, `STILL_S` later, with the stack of every thread.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger("tether.rollout")

WARN_S = 2.0  # a loop that answers nothing for so long has lost heartbeats
STILL_S = 30.0  # beyond the limit, whoever it is that blocks


class LoopWatch:
    """Of the running loop. `code_file`: of the rollout called `name`; `give_up` hears why, once, after `limit_s`."""

    def __init__(self, name: str, code_file: str, limit_s: float, give_up: Callable[[str], None]) -> None:
        self._name, self._code_file, self._limit_s, self._give_up = name, code_file, limit_s, give_up
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._answered, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._answered.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.is_set():
            self._answered.clear()
            asked_at, warned = time.monotonic(), False
            faulthandler.dump_traceback_later(self._limit_s + STILL_S, exit=True)
            self._loop.call_soon_threadsafe(self._answered.set)
            while not self._over.is_set() and not self._answered.wait(WARN_S / 4):
                for_s = time.monotonic() - asked_at
                where = self._culprit() if for_s > WARN_S else ""
                if where and not warned:
                    warned = True
                    log.warning(
                        "%s blocks this generator at %s: it must await, or call its tools by asyncio.to_thread",
                        self._name,
                        where,
                    )
                if where and for_s > self._limit_s:
                    self._give_up(f"{self._name} blocked this generator for {for_s:.0f} s at {where}")
                    return
            self._over.wait(WARN_S / 4)

    def _culprit(self) -> str:
        """The line of the rollout's file that the loop is in; "" when it is in none."""
        frame = sys._current_frames().get(self._loop_thread)
        stack = traceback.extract_stack(frame) if frame is not None else []
        lines = [entry for entry in stack if entry.filename == self._code_file]
        return f"{lines[-1].filename}:{lines[-1].lineno} ({lines[-1].name})" if lines else ""
