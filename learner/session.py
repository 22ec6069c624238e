"""One learner process from start to end: meet the other ranks, load or resume, warm up, train.

What `launch/learner.py` calls. The order matters: the checkpoint is chosen before anything is opened, and the broker
is told only what this process really holds.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from learner.announcer import Announcer
from learner.link import Link, Standing
from learner.models import Models
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.states import State, StateClock
from learner.trainer import Ended, Trainer
from learner.warmup import WarmupStep, warm_up
from protocol.addresses import Addresses
from protocol.checkpoints import PREFIX, Found, latest_valid, step_of
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.examples import WARMUP_FILE, read_examples
from protocol.keys import read_client_key
from protocol.shared_memory import folder_of, private_folder

log = logging.getLogger("tether.learner")

COLLECTIVE_S = 600.0
NONE, ALL_DAMAGED = -1, -2  # in the place of a checkpoint's step


def train(config: Config, run_dir: Path, resume: bool) -> Ended:
    """All of one rank's life."""
    ranks = Ranks.open(os.environ, config.run.device, COLLECTIVE_S)
    models = Models.open(config, ranks)
    resumed = _resume(run_dir, models, ranks) if resume else None
    standing = resumed or Standing(0, -1, b"")
    link = Link(
        Addresses.read(run_dir),
        read_client_key(run_dir / "keys" / "learner.key"),
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        standing=standing,
        settings_digest=config.result_digest(),
        wait_s=config.watchdog.orphan_s,
    )
    clock = StateClock(link.say)
    shared = _shared_folder(ranks)
    publisher = Publisher(shared / "snapshots", models.policy, ranks)
    announcer = Announcer(publisher, link, ranks, lambda version: evaluation_is_due(config, version, link.num_steps))
    recorder = Recorder(config, run_dir, ranks, models, link, announcer, config.model.path, standing)
    try:
        if resumed is None and config.warmup.steps:
            _warm_up(config, run_dir, models, ranks, recorder, clock)
        return Trainer(config, ranks, models, link, announcer, recorder, clock, standing.version).run()
    finally:
        recorder.close()
        link.close("the learner leaves")
        if ranks.is_first:
            shutil.rmtree(shared, ignore_errors=True)


def evaluation_is_due(config: Config, version: int, num_steps: int) -> bool:
    """Before the first step, after every `evaluation.every`, and after the last."""
    every = config.evaluation.every
    if not every or (version == 0 and not config.evaluation.before_training):
        return False
    return version % every == 0 or version == num_steps


def _resume(run_dir: Path, models: Models, ranks: Ranks) -> Standing | None:
    """Rank 0 chooses the checkpoint; a run that has not written one (None) starts from its beginning, and says so.

    Raises ConfigError if there are some and none verifies: what they hold would be written over.
    """
    folder = run_dir / "checkpoints"
    found = latest_valid(folder) if ranks.is_first else Found(None, ())
    for damage in found.damaged:
        log.error("this checkpoint is damaged and not used: %s", damage)
    step = step_of(found.path) if found.path else ALL_DAMAGED if found.damaged else NONE
    step = ranks.first_rank_says(step)
    if step == ALL_DAMAGED:
        raise ConfigError(
            f"expected a checkpoint to resume from in {folder}, all there are damaged (rank 0's log says how); "
            "move that folder away to start this run from its beginning"
        )
    if step == NONE:
        log.warning("no checkpoint to resume from: starting from the beginning")
        return None
    extras = models.load(folder / f"{PREFIX}{step}")
    log.info("resuming from the checkpoint of version %d", extras["version"])
    return Standing(extras["version"], -1, extras["ledger"], extras["skipped"])


def _warm_up(
    config: Config, run_dir: Path, models: Models, ranks: Ranks, recorder: Recorder, clock: StateClock
) -> None:
    examples = read_examples(run_dir / WARMUP_FILE)

    def report(step: WarmupStep) -> None:
        clock.enter(State.WARMING_UP, f"supervised step {step.step + 1} of {config.warmup.steps}, loss {step.loss:.3f}")
        curves = {"warmup/loss": step.loss, "warmup/lr": step.learning_rate, "warmup/grad_norm": step.grad_norm}
        recorder.warmup(step.step, curves)

    clock.enter(State.WARMING_UP, f"{config.warmup.steps} supervised steps")
    policy = models.policy_to_warm(config, ranks)
    warm_up(policy, examples, config.warmup, config.run.seed, config.learner.micro_batch_tokens, ranks, report)
    models.warmed_up(policy, config)


def _shared_folder(ranks: Ranks) -> Path:
    """Rank 0's folder in shared memory, where all ranks of this host write snapshots."""
    if ranks.is_first:
        private_folder("learner")
    return folder_of("learner", ranks.first_rank_says(os.getpid()))
