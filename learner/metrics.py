"""Every curve of a run, and their one writer: learner rank 0. The only file that imports tensorboard.

A curve that is not in `CURVES` cannot be written, so the table below is all there is. Both files are cut back on resume
(`MetricsWriter`), so a resumed run has one point per step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from torch.utils.tensorboard import SummaryWriter

CURVES = {
    "reward/mean": "mean reward of the completions a step trained",
    "reward/std": "standard deviation of a group's rewards, mean over groups",
    "reward/equal_group_frac": "groups whose rewards are all equal: they carry no signal",
    "reward/*": "mean of one reward function before its weight; FUNCTION/KEY: of a number it returned beside",
    "eval/accuracy": "mean@k of the first reward function over all held-out prompts",
    "eval/length_mean": "tokens of a held-out completion",
    "eval/error_frac": "held-out completions that failed or whose reward did: they are in no other curve",
    "eval/*@*": "mean@k, pass@j or maj@k: of FUNCTION over all held-out prompts, of SOURCE/FUNCTION over one source's",
    "eval/*": "mean of one reward function over the held-out completions",
    "policy/loss": "loss of the batch, mean of its optimizer steps",
    "policy/kl": "KL of the policy before the batch against the current one, per token (k1)",
    "policy/kl_reference": "KL to the reference model per token, as the settings form it",
    "policy/kl_coef": "its coefficient",
    "policy/entropy": "mean entropy of the current policy's next-token distribution",
    "policy/clip_frac_low": "tokens whose ratio was clipped below, of all in the loss",
    "policy/clip_frac_high": "tokens whose ratio was clipped above, of all in the loss",
    "policy/clip_frac_dual": "tokens of negative advantage beyond the dual clip, of all in the loss",
    "policy/ratio_mean": "mean ratio of the current policy to the one before the batch",
    "policy/ratio_std": "its standard deviation",
    "policy/grad_norm": "norm of the gradient before clipping",
    "policy/lr": "learning rate; 0 while the critic learns alone",
    "policy/skipped_steps": "optimizer steps so far that were skipped because loss or gradient was not finite",
    "policy/micro_batches": "forward and backward passes of each rank",
    "policy/updates": "optimizer steps of the batch; 0 while the critic learns alone",
    "critic/loss": "value loss of the batch, mean of its optimizer steps",
    "critic/clip_frac": "tokens whose value was clipped, of all in the loss",
    "critic/explained_variance": "share of the returns' variance that the values before the batch explain; 1: all",
    "critic/value_mean": "mean value of the tokens in the loss",
    "critic/return_mean": "mean return of them",
    "critic/grad_norm": "norm of its gradient before clipping",
    "critic/lr": "its learning rate",
    "critic/skipped_steps": "its optimizer steps so far that were skipped because loss or gradient was not finite",
    "staleness/mean": "version in training minus version of the token, mean over tokens",
    "staleness/max": "the same, of the oldest token",
    "staleness/in_flight": "groups that are leased or finished and not yet in a batch",
    "staleness/left_out_frac": "tokens too old for the loss, of all that arrived",
    "mismatch/kl": "policies that sampled against the one before the batch, per token (k3)",
    "mismatch/kl_k1": "the same, estimated by k1",
    "mismatch/ratio_mean": "mean ratio of the policy before the batch to those that sampled; 1: they agree",
    "mismatch/ratio_p*": "its quantiles",
    "mismatch/chi2": "chi-square divergence of the two",
    "mismatch/ess": "effective sample size of those ratios, of 1",
    "mismatch/sequence_ess": "the same, of whole completions",
    "mismatch/outside_frac": "tokens whose ratio is outside [corrections.low, corrections.high]",
    "mismatch/negative_masked_frac": "tokens that corrections.negative_kl_mask leaves out",
    "mismatch/rejected_frac": "tokens that the corrections leave out of the policy loss",
    "mismatch/age_*": "ratio and KL of the tokens that are so many versions old",
    "mismatch/missing_logprobs": "tokens left out because the generator gave no log-probability",
    "completion/length_mean": "tokens of a completion",
    "completion/length_max": "tokens of the longest completion",
    "completion/truncated_frac": "completions cut off at sampling.max_tokens",
    "completion/error_frac": "completions without a reward because generation or a reward function failed",
    "warmup/loss": "mean negative log-probability of an answer token in the supervised warm start",
    "warmup/lr": "its learning rate",
    "warmup/grad_norm": "its gradient norm before clipping",
    "ledger/*": "prompts by what became of them",
    "broker/*": "the broker's own counters",
    "time/*": "share of the learner's time in one state; they add up to 1",
    "throughput/step_s": "seconds of a step, waiting included",
    "throughput/tokens_per_s": "completion tokens trained per second",
    "throughput/samples_per_s": "completions trained per second",
    "weights/publish_s": "how long the learner stood still for a snapshot",
    "weights/apply_s": "how long a generator stood still to load one",
    "weights/bytes": "size of a snapshot",
    "generator/*": "one generator's numbers, by its id",
    "generators/*": "the same over all generators, where there are more than 64: least, mean and most",
}


class MetricsWriter:
    """Appends to `run_folder`/metrics.jsonl and `run_folder`/tensorboard. Open it in one process only."""

    def __init__(self, run_folder: Path, first_step: int = 0) -> None:
        """Points at `first_step` and later are removed: the steps from there on are about to be run again."""
        run_folder.mkdir(parents=True, exist_ok=True)
        path = run_folder / "metrics.jsonl"
        cut_lines(path, first_step, "step")
        self._lines: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._board = SummaryWriter(
            str(run_folder / "tensorboard"),
            purge_step=first_step,
            flush_secs=10,
            max_queue=1000,  # points of several steps: with the default of 10, a step waits for its own to be written
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one point per curve. What is not finite is null in the file and no point."""
        for name in values:
            assert is_known(name), f"{name} is not in metrics.CURVES"
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3)} | finite) + "\n")
        self._lines.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def is_known(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in CURVES)


def cut_lines(path: Path, first: int, key: str) -> None:
    """Keep the lines whose `key` is below `first`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)[key] < first:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
