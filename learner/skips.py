"""Optimizer steps that were skipped because loss or gradient was not finite: counted, written down, and too many.

Runs in every learner rank. Each model has a count of its own, so that a critic that learns does not hide a policy that
cannot.
"""

from __future__ import annotations

import logging
from collections import Counter

from learner.curves import prompt_numbers
from learner.mini_batches import MiniBatch
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.trained_model import OptimizerStep
from protocol.errors import NumericError
from protocol.types import Share

log = logging.getLogger("tether.trainer")

MAX_SKIPPED_IN_A_ROW = 3


class Skips:
    """Of one run, by model: policy or critic. `total` is that of rank 0, with what was skipped before a resume."""

    def __init__(self, ranks: Ranks, recorder: Recorder) -> None:
        self._ranks, self._recorder = ranks, recorder
        self.total = Counter(recorder.num_skipped)
        self._in_a_row: Counter[str] = Counter()

    def count(self, model: str, update: OptimizerStep, number: int, mini_batch: MiniBatch, share: Share) -> None:
        """Take note of update `number` of a batch; collective. Raises NumericError at the third skipped in a row."""
        if update.applied:
            self._in_a_row[model] = 0
            return
        self.total[model] += 1
        self._in_a_row[model] += 1
        step, size = share.step, share.rewards.shape[1]
        log.error("update %d of step %d was skipped: loss or gradient of the %s is not finite", number, step, model)
        prompts = self._ranks.max_across(prompt_numbers(share))
        completions = [(int(prompts[str(place // size)]), place % size) for place in mini_batch.places.tolist()]
        self._recorder.skipped_update(step, number, model, update.grad_norm, completions)
        if self._in_a_row[model] >= MAX_SKIPPED_IN_A_ROW:
            setting = {"policy": "learner.learning_rate", "critic": "critic.learning_rate"}[model]
            raise NumericError(
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row of the {model} had a non-finite loss or gradient, the last "
                f"of step {step}; its weights are unchanged since. Lower {setting}, or resume from an older checkpoint"
            )
