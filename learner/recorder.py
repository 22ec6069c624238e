"""What a run leaves behind: curves, samples, evaluations, checkpoints. Rank 0 writes; the others only join the
checkpoint.

The checkpoint holds the ledger as of the cut of the batch it was trained on, so that after any crash each prompt has
influenced the surviving weights exactly once.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils import cached_file

from learner.announcer import Announcer
from learner.evaluations import EVALUATIONS_FILE, evaluation_curves, log_evaluation
from learner.link import Link, Standing, Taken
from learner.metrics import MetricsWriter, cut_lines
from learner.models import Models
from learner.ranks import Ranks
from learner.samples import cut_evaluations, cut_samples, sample_fields, spread, write_samples
from protocol.config import Config
from protocol.messages import Evaluation
from protocol.rewards import weighted_functions
from protocol.types import Share, Tokens

log = logging.getLogger("tether.recorder")

SKIPPED_FILE = "skipped.jsonl"


class Recorder:
    """One per rank. `start`: where this process starts; later points of an earlier try are cut off."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        ranks: Ranks,
        models: Models,
        link: Link,
        announcer: Announcer,
        model_path: str,
        start: Standing,
    ) -> None:
        self._config, self._run_dir, self._ranks, self._models, self._link = config, run_dir, ranks, models, link
        self._announcer = announcer
        self._ledger, self._skipped = start.ledger, start.skipped
        self._saved_version = start.version if start.version else -1
        self._writer = MetricsWriter(run_dir, start.version) if ranks.is_first else None
        self.num_skipped: Counter[str] = Counter()  # updates before `start`, by model; of rank 0
        if ranks.is_first:
            cut_lines(run_dir / EVALUATIONS_FILE, start.version, "version")
            cut_lines(run_dir / SKIPPED_FILE, start.version, "step")
            cut_samples(run_dir, start.version)
            cut_evaluations(run_dir, start.version)
            self.num_skipped = _num_skipped(run_dir / SKIPPED_FILE)
        self._tokenizer = Tokenizer.from_file(cached_file(model_path, "tokenizer.json")) if ranks.is_first else None

    def step(self, taken: Taken, curves: dict[str, float], step_s: float, *, skipped: bool) -> None:
        """Curves and samples of one step, and the evaluations that arrived since the last one."""
        self._ledger, self._skipped = taken.ledger, skipped
        if self._writer is None:
            return
        share = taken.share
        completions = curves.pop("completion/count")
        curves["throughput/step_s"] = step_s
        curves["throughput/samples_per_s"] = completions / step_s
        curves["throughput/tokens_per_s"] = completions * curves["completion/length_mean"] / step_s
        curves["weights/publish_s"] = self._announcer.stall_s
        curves["weights/bytes"] = float(self._announcer.snapshot_bytes)
        self._writer.write(share.step, curves)
        self._link.heartbeat_numbers = {name: curves[name] for name in SHOWN if name in curves}
        if share.step % self._config.run.samples_every == 0:
            write_samples(self._run_dir, share.step, self._samples(share))
        self.evaluations()

    def skipped_update(
        self, step: int, update: int, model: str, grad_norm: float, completions: list[tuple[int, int]]
    ) -> None:
        """An update that was not finite, with what it would have trained: (prompt, sample) of all ranks."""
        if self._writer is not None:
            fields = {"step": step, "update": update, "model": model, "grad_norm": str(grad_norm)}
            self._append(SKIPPED_FILE, fields | {"completions": completions})

    def warmup(self, step: int, values: dict[str, float]) -> None:
        """Curves of the supervised warm start."""
        if self._writer is not None:
            self._writer.write(step, values)

    def evaluations(self) -> None:
        """Write down what has arrived of them; x is the version that was evaluated."""
        for evaluation in self._link.evaluations():
            self._evaluation(evaluation)

    def checkpoint_is_due(self, version: int) -> bool:
        every = self._config.checkpoint.every
        return bool(every) and version % every == 0

    def checkpoint(self, version: int) -> None:
        """Collective. Nothing to do when this version is saved already, or nothing was trained."""
        if version == self._saved_version:
            return
        extras: dict[str, Any] = {
            "version": version,
            "ledger": self._ledger,
            "skipped": self._skipped,
            "settings": self._config.model_dump(mode="json"),
        }
        started = time.monotonic()
        keep = self._config.checkpoint.keep
        path = self._models.save(self._run_dir / "checkpoints", version, extras, keep, self._ranks)
        self._saved_version = version
        log.info("checkpoint of version %d in %.1f s: %s", version, time.monotonic() - started, path)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _evaluation(self, evaluation: Evaluation) -> None:
        log_evaluation(evaluation)
        if self._writer is None:
            return
        self._writer.write(evaluation.version, evaluation_curves(evaluation))
        self._append(EVALUATIONS_FILE, evaluation.model_dump())

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        with open(self._run_dir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def _samples(self, share: Share) -> list[dict[str, Any]]:
        assert self._tokenizer is not None
        names = [name for name, _ in weighted_functions(self._config)]

        def text(tokens: Tokens) -> str:
            return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

        return [
            sample_fields(share, item, names, text(item.prompt_tokens), text(item.completion.tokens))
            for item in spread(share.items, self._config.run.samples_per_step)
        ]


def _num_skipped(path: Path) -> Counter[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return Counter(json.loads(line)["model"] for line in lines)


SHOWN = (
    "reward/mean",
    "reward/std",
    "reward/equal_group_frac",
    "policy/kl_reference",
    "policy/entropy",
    "policy/grad_norm",
    "policy/lr",
    "policy/loss",
    "staleness/mean",
    "staleness/max",
    "completion/length_mean",
    "completion/truncated_frac",
    "mismatch/kl",
    "throughput/tokens_per_s",
    "time/waiting_for_trajectories",
    "time/training",
    "time/publishing",
)
"""What heartbeats carry to the console."""
