"""What the broker knows of a run: shared by the desks that answer learner and generators.

It holds no truth: everything here is rebuilt by `restore` from what the learner says in its hello. One epoch lasts
from one restore to the next; whatever was handed out in an earlier one is void.
"""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from broker.batches import ScheduleSettings
from broker.ledger import Ledger
from broker.peers import Peers
from broker.prompts import PromptSource
from broker.scheduler import Scheduler
from broker.shelf import Shelf, Shelved
from protocol.config import Config
from protocol.errors import ProtocolError
from protocol.messages import Hello, SharePage, VersionHint

log = logging.getLogger("tether.broker")


@dataclass(eq=False)
class RunState:
    """One run in the broker's memory."""

    config: Config
    run_id: str
    run_dir: Path
    host: str
    source: PromptSource
    files: dict[str, tuple[Path, int, str]]  # name -> (path, bytes, sha256): what generators fetch of the model folder
    vocab_size: int
    reward_digest: str
    rollout_digest: str = ""
    epoch: int = field(default_factory=lambda: secrets.randbits(63) | 1)
    peers: Peers = field(default_factory=Peers)
    shelf: Shelf = field(default_factory=Shelf)
    scheduler: Scheduler | None = None  # None: no learner has said hello yet
    learner_incarnation: int = 0
    pages: dict[tuple[int, int], list[SharePage]] = field(
        default_factory=dict
    )  # by (step, rank), until the step's advance
    num_ranks: int = 1
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # finished in this epoch, oldest first
    evaluation_wanted: bool = False
    evaluation_started_at: float = 0.0
    hints: list[tuple[bytes, VersionHint]] = field(default_factory=list)
    draining: str = ""  # why the run is to end early
    verdict: str = ""  # why the run cannot go on
    changed: bool = False  # something happened that may answer a parked question
    progress_at: float = 0.0  # when a result was accepted, a batch cut or a version announced
    num_results: dict[str, int] = field(default_factory=dict)  # by final status
    num_errors: int = 0  # accepted results that say why there is no completion

    @property
    def num_steps(self) -> int:
        return self.config.steps_for(self.source.num_rows)

    def restore(self, hello: Hello, now: float) -> None:
        """Start an epoch from what the learner holds; a dead broker and a dead learner are both recovered so."""
        try:
            books = Ledger.restore(msgpack.unpackb(hello.ledger)) if hello.ledger else Ledger()
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError("ledger", f"the learner's ledger cannot be read: {error}") from None
        training = hello.training_step if hello.training_step >= 0 else None
        if training not in (None, hello.version):
            raise ProtocolError("order", f"step {training} cannot be in training at version {hello.version}")
        if hello.skipped:
            books.skip_step()
        self.scheduler = Scheduler(self._schedule_settings(), books, hello.version, training)
        self.epoch = secrets.randbits(63) | 1
        self.learner_incarnation, self.num_ranks = hello.incarnation, hello.num_ranks
        self.pages.clear()
        self.shelf.clear()
        self.evaluations.clear()
        self.evaluation_wanted = False
        self.progress_at = now
        self.changed = True
        log.info(
            "epoch %016x: version %d, %d prompts settled of %d offered",
            self.epoch,
            hello.version,
            books.num_settled,
            books.offered,
        )

    def _schedule_settings(self) -> ScheduleSettings:
        config = self.config
        epochs_end = None if config.run.steps else int(config.run.epochs * self.source.num_rows)
        return ScheduleSettings(
            prompts_per_step=config.batch.prompts,
            group_size=config.samples_per_lease,
            max_staleness=config.staleness.max,
            steps=self.num_steps,
            num_prompts=epochs_end,
            at_bound=config.staleness.at_bound,
            pacing_margin=config.staleness.pacing_margin if config.staleness.pacing else None,
            baseline_sample=config.batch.group_size if config.algorithm.advantage == "remax" else None,
            filter_equal_rewards=config.algorithm.filter_equal_groups,
            lease_ttl_s=config.watchdog.lease_ttl_s,
            evaluate_at_end=config.evaluates,
        )

    @property
    def announced(self) -> Shelved | None:
        """The weights of the current version: what generators should hold. None until they are published."""
        return self.shelf.version(self.scheduler.version) if self.scheduler else None

    def scheduler_now(self) -> Scheduler:
        """Raises ProtocolError while no learner has introduced itself."""
        if self.scheduler is None:
            raise ProtocolError("no_learner", "the learner has not said hello yet")
        return self.scheduler

    def write_line(self, name: str, fields: dict[str, Any]) -> None:
        """Append one JSON line to a file of the run."""
        with open(self.run_dir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
