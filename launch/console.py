"""Draws a run while it goes on: one live frame on a terminal, plain lines anywhere else.

Runs in `launch/cluster.py`. What is drawn is decided in `launch/frames.py`; here are the screen, the pace and the
memory: which steps were printed already, and in which states processes were seen lately.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Screen
from rich.live import Live
from rich.text import Text

from launch.bottleneck import is_waiting
from launch.chart import printable
from launch.devices import num_cores
from launch.frames import evaluation_line, frame, stamp, step_line, waiting_line, warmup_line
from launch.history import History
from launch.picture import Picture
from launch.supervisor import Seen
from protocol.brought_code import shown_name
from protocol.config import Config

QUIET_S = 30.0
"""A pipe gets a line at least this often."""
RECENT_ANSWERS = 120
"""Answers of the broker over which waiting is averaged."""
FEW_ANSWERS = 5
"""Fewer say nothing about who waits for whom."""


class Console:
    """`update` a few times a second; `tell` what must stay readable; `close` leaves the last frame on the screen."""

    def __init__(self, config: Config, run_dir: Path, screen: Screen) -> None:
        self._config, self._run_dir, self._screen = config, run_dir, screen
        self._history = History(run_dir)
        self._live = Live(console=screen, auto_refresh=False, vertical_overflow="crop") if screen.is_terminal else None
        self._status: Mapping[str, Any] = {}
        self._rates: dict[str, float] = {}
        self._tokens: dict[str, tuple[float, float]] = {}  # by generator: (when, tokens so far)
        self._waits: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=RECENT_ANSWERS))
        self._met: set[str] = set()
        self._printed_steps = self._printed_evaluations = self._printed_warmup = self._printed_notes = 0
        self._last_line_at = self._last_step_at = time.monotonic()
        self._history.read()  # what an earlier attempt has written is not news
        self._skip_printed()

    def start(self) -> None:
        if self._live:
            self._live.start()

    def answered(self, status: Mapping[str, Any]) -> None:
        """Take in the broker's status; {} when it does not answer."""
        now = time.monotonic()
        self._status = status
        for process in status.get("processes", ()):
            self._met.add(process["name"])
            if self._history.steps:  # before the first one, everybody waits for everybody's start
                self._waits[process["name"]].append(is_waiting(process["state"]))
            tokens = process["numbers"].get("generated_tokens")
            if tokens is not None:
                then, before = self._tokens.get(process["name"], (now, tokens))
                if tokens > before and now > then:
                    self._rates[process["name"]] = (tokens - before) / (now - then)
                if tokens != before or process["name"] not in self._tokens:
                    self._tokens[process["name"]] = (now, tokens)

    def tell(self, line: str) -> None:
        """A line that stays: above the frame, or in the pipe."""
        self._screen.print(Text(stamp(printable(line), time.time())), soft_wrap=True)
        self._last_line_at = time.monotonic()

    def update(self, processes: Sequence[Seen]) -> None:
        self._history.read()
        for note in self._status.get("data", ())[self._printed_notes :]:  # which rows and columns the run reads
            self.tell(note)
            self._printed_notes += 1
        picture = self._picture(processes)
        if self._live:
            self._live.update(frame(picture), refresh=True)
        else:
            self._print_news(picture)

    def print_once(self) -> None:
        """One frame, wherever this goes."""
        self._history.read()
        self._screen.print(frame(self._picture(())))

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _print_news(self, picture: Picture) -> None:
        if len(picture.steps) < self._printed_steps:  # a resumed learner runs these steps again
            self._printed_steps = len(picture.steps)
        for row in picture.warmup[self._printed_warmup :]:
            if (line := warmup_line(row, picture)) is not None:
                self.tell(line)
        for row in picture.evaluations[self._printed_evaluations :]:
            self.tell(evaluation_line(row, [shown_name(use.use) for use in self._config.rewards_of_evaluation]))
        for row in picture.steps[self._printed_steps :]:
            self.tell(step_line(row, picture))
            self._last_step_at = time.monotonic()
        self._skip_printed()
        if time.monotonic() - self._last_line_at >= QUIET_S:
            self.tell(waiting_line(picture, time.monotonic() - self._last_step_at))

    def _skip_printed(self) -> None:
        history = self._history
        self._printed_steps, self._printed_warmup = len(history.steps), len(history.warmup)
        self._printed_evaluations = len(history.evaluations)

    def _picture(self, processes: Sequence[Seen]) -> Picture:
        return Picture(
            name=self._run_dir.name,
            config=self._config,
            processes=processes,
            steps=self._history.steps,
            warmup=self._history.warmup,
            evaluations=self._history.evaluations,
            status=self._status,
            rates=self._rates,
            waiting={name: sum(seen) / len(seen) for name, seen in self._waits.items() if len(seen) >= FEW_ANSWERS},
            met=frozenset(self._met),
            run_dir=_from_here(self._run_dir),
            cores=num_cores(),
        )


def _from_here(path: Path) -> str:
    """The shortest name of a folder that can be typed where this command was typed."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def open_screen() -> Screen:
    """Standard output; whether it is a terminal decides how a run is drawn."""
    return Screen(highlight=False)
