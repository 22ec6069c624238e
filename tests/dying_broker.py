"""A broker that dies of SIGKILL at chosen moments and is there again at once: `python -m tests.dying_broker RUN`.

Every life is a process of its own, forked from one that has imported everything, and runs what `launch/broker.py` runs.
Pages hold one completion each, so that every share has several. What a life knew when it died stands in deaths.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import broker.learner_desk
import broker.open_run
import broker.server
import broker.service
from broker.outcome import Later
from launch.broker import serve
from launch.log_lines import log_to_stderr
from protocol.messages import Advance, Beat, Message, Publish, SharePage, Take, Wait
from protocol.shares import split_pages

DEATHS_FILE = "deaths.jsonl"


class Moment(NamedTuple):
    """When a life ends: as `rank` asks for `page` of its share of `step`, while all other ranks hold theirs whole."""

    step: int
    rank: int
    page: int  # -1: the last


class OnCutting(NamedTuple):
    """When a life ends: the batch of `step` is cut, and nobody has a page of it."""

    step: int


class BothHalfWay(NamedTuple):
    """When a life ends: two ranks have the first pages of their shares of `step`, and neither has the rest."""

    step: int


class OnTold(NamedTuple):
    """When a life ends: all ranks were sent the whole of their shares of `step`, a moment ago."""

    step: int


class OnHearing(NamedTuple):
    """When a life ends: `kind` arrives while `step` is in training, and is not answered."""

    step: int
    kind: type[Message]


Death = Moment | OnCutting | BothHalfWay | OnTold | OnHearing

DEATHS: tuple[Death, ...] = (
    Moment(0, rank=1, page=0),
    Moment(1, rank=1, page=1),
    Moment(2, rank=1, page=-1),
    Moment(3, rank=0, page=0),
    Moment(3, rank=1, page=0),
    Moment(4, rank=0, page=1),
    Moment(5, rank=0, page=-1),
    OnCutting(6),
    BothHalfWay(7),
    OnTold(8),
    OnHearing(9, Publish),
    OnHearing(10, Advance),
)


class DyingService(broker.service.Service):
    """The broker's service until its last moment."""

    def __init__(self, death: Death | None, run: Any) -> None:
        super().__init__(run)
        self._death, self._state = death, run
        self._told: set[int] = set()  # ranks that were sent the last page of the step
        self._holding: set[int] = set()  # ranks that say they wait for the others with it
        self._half_way: set[int] = set()

    def handle(self, message: Message, header: Any, *sender: Any) -> Message | Later:
        death = self._death
        if death is None:
            return super().handle(message, header, *sender)
        if isinstance(message, Beat):
            self._note_who_holds(message, header.session)
        if isinstance(death, OnHearing) and isinstance(message, death.kind) and self._is_training(death.step):
            self._die()
        question = message if isinstance(message, Take) and message.step == death.step else None
        if question and (delay := self._before(question)):
            return Later(Wait(reason=delay))
        answer = super().handle(message, header, *sender)
        if question and isinstance(answer, SharePage):
            if isinstance(death, OnCutting):
                self._die()
            if answer.page == answer.num_pages - 1:
                self._told.add(question.rank)
        return answer

    def tick(self, now: float) -> None:
        if isinstance(self._death, OnTold) and len(self._told) == self._state.num_ranks:
            self._die()
        super().tick(now)

    def _note_who_holds(self, beat: Beat, session: int) -> None:
        assert self._death is not None
        peer = self._state.peers.get(session)
        if peer and (beat.state, beat.detail) == ("waiting_for_ranks", f"at step {self._death.step}"):
            self._holding.add(peer.rank)
            self._state.changed = True

    def _before(self, question: Take) -> str:
        """Dies if it is time; or why the question has to wait."""
        match self._death:
            case Moment(_, rank, page) if question.rank == rank:
                if len(self._told & self._holding - {rank}) < question.num_ranks - 1:
                    return "the others have their shares first"
                if question.page == page % len(self._pages(question)):
                    self._die()
            case BothHalfWay() if question.page == 1:
                self._half_way.add(question.rank)
                if len(self._half_way) == question.num_ranks:
                    self._die()
                return "both are half way first"
        return ""

    def _pages(self, question: Take) -> list[SharePage]:
        pages: list[SharePage] = self._state.pages[question.step, question.rank]
        return pages

    def _is_training(self, step: int) -> bool:
        return self._state.scheduler is not None and self._state.scheduler.training == step

    def _die(self) -> None:
        assert self._death is not None
        step = self._death.step
        pages = [page for (cut, _), pages in self._state.pages.items() if cut == step for page in pages]
        last_words = {
            "step": step,
            "epoch": self.epoch,
            "prompts": sorted({int(prompt) for page in pages for prompt in page.prompts}),
            "num_pages": len(pages),
            "at": time.monotonic(),
        }
        with open(self._state.run_dir / DEATHS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(last_words) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def live(run_dir: Path, death: Death | None) -> None:
    broker.service.Service = partial(DyingService, death)  # type: ignore[assignment, misc]
    broker.learner_desk.split_pages = partial(split_pages, page_bytes=1)
    serve(run_dir)


def main(run_dir: Path) -> None:
    log_to_stderr("broker")
    for death in (*DEATHS, None):
        child = os.fork()
        if child == 0:
            live(run_dir, death)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert death is None or os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{death}: status {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
