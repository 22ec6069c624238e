"""How much of perfect overlap does the loop reach? One core for the generator, one for the learner, at S = 0, 1, 2, 4.

Perfect overlap is the slower side at its own pace. Both paces are measured in the same run of this program, by stopping
the other side of a real run: the generator while the learner stands still, then the learner on what has piled up;
each alone, and with the other core kept busy, because two busy cores of one chip are slower than a lone one.

    python bench/loop.py [--load generation] [--repeats 3] [--steps 30] [--out FOLDER]

Prints a table and one JSON line. Every figure is the median of the repeats, which are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from bench.pinned_run import GENERATOR_CORE, LEARNER_CORE, PinnedRun, Spinner
from protocol.settings import load as load_settings
from tests.cluster_process import steps_of

BOUNDS = (0, 1, 2, 4)
PILE = 40
"""S of the run that measures each side alone: the generator may run so many batches ahead."""

LOADS: Mapping[str, Sequence[str]] = {
    # the demo as it is: sampling a completion costs more than training it
    "generation": (),
    # a long system message: the learner pays for it with every completion, the generator once for each group
    "training": ("--data.system", "Think of every number in turn and do not forget any of them. " * 3),
}
COMMON = ("--recipe", "demo", "--generators", "1", "--warmup.steps", "0", "--evaluation.every", "0")
COMMON += ("--checkpoint.every", "0", "--learner.learning_rate", "1e-9", "--watchdog.heartbeat_s", "0.25")
COMMON += ("--data.max_prompt_tokens", "320")
NUM_SKIPPED = 6  # steps at the start of a loop, before pacing has measured anything
NUM_SLICES = 6  # of each side alone, with the other core idle and busy in turn
SLICE_S = 4.0  # of the generator alone; it goes on until there is enough for the learner
SLICE_STEPS = 4  # of the learner alone; the first is not whole
NUM_PILED = (NUM_SLICES + 1) * SLICE_STEPS  # batches that the learner needs for that
DEADLINE_S = 300.0  # of either side alone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=tuple(LOADS), default="generation", help="which side is the slower one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="measured steps of one loop")
    parser.add_argument("--bounds", type=int, nargs="+", default=BOUNDS, help="values of S")
    parser.add_argument("--out", type=Path, help="where the runs are written; default: a folder that is removed")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        result = measure(out, args.load, args.repeats, args.steps, args.bounds)
    print_table(result)
    print(json.dumps(result))
    return 0


def measure(out: Path, load: str, repeats: int, steps: int, bounds: Sequence[int]) -> dict[str, Any]:
    paces, loops = [], []
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}: each side alone, then S = {', '.join(map(str, bounds))}", flush=True)
        paces.append(each_side_alone(out, load, f"alone-{repeat}"))
        loops.append({bound: loop(out, load, f"s{bound}-{repeat}", bound, steps) for bound in bounds})
    pace = {name: median(one[name] for one in paces) for name in paces[0]}
    perfect = min(pace["generator_busy"], pace["learner_busy"])
    rows = []
    for bound in bounds:
        seen = {name: median(one[bound][name] for one in loops) for name in loops[0][bound]}
        of_perfect = median(
            one[bound]["samples_per_s"] / min(own["generator_busy"], own["learner_busy"])
            for one, own in zip(loops, paces, strict=True)
        )
        rows.append({"max_staleness": bound, "of_perfect": of_perfect, **seen})
    return {
        "bench": "loop",
        "load": load,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "repeats": repeats,
        "steps": steps,
        "samples_per_s": pace | {"perfect_overlap": perfect},
        "loops": rows,
    }


# --- Each side alone --------------------------------------------------------------------------------------------------


def each_side_alone(out: Path, load: str, name: str) -> dict[str, float]:
    """Samples per second of the generator and of the learner, with the other core idle and busy."""
    arguments = [*flags(out, load, name, bound=PILE, steps=PILE + 50), "--staleness.pacing", "false"]
    spinners = {core: Spinner(core) for core in (GENERATOR_CORE, LEARNER_CORE)}
    try:
        with PinnedRun(out, out / name, *arguments) as run:
            run.until(lambda: accepted(run)[1] > 0, "the first results")
            with run.alone("generator-0"):
                generator = rates(generator_slices(run, spinners[LEARNER_CORE]), "generator")
            with run.alone("learner-0"):
                slices = [
                    learner_slice(run, spinners[GENERATOR_CORE], busy) for busy in [False, True] * (NUM_SLICES // 2)
                ]
            return generator | rates(slices, "learner")
    finally:
        for spinner in spinners.values():
            spinner.close()


def rates(slices: Sequence[tuple[bool, float]], who: str) -> dict[str, float]:
    return {
        f"{who}_{word}": median(rate for was_busy, rate in slices if was_busy is busy)
        for word, busy in (("alone", False), ("busy", True))
    }


def generator_slices(run: PinnedRun, other: Spinner) -> list[tuple[bool, float]]:
    """Until there are enough of them, and enough batches for the learner."""
    slices: list[tuple[bool, float]] = []
    wanted, deadline = NUM_PILED * prompts_per_step(run), time.monotonic() + DEADLINE_S
    while len(slices) < NUM_SLICES or len(slices) % 2 or run.status()["ledger"]["finished"] < wanted:
        assert time.monotonic() < deadline, f"{run.status()['ledger']} after {DEADLINE_S} s, {wanted} groups are wanted"
        busy = bool(len(slices) % 2)
        with other.busy(busy):
            started, first = accepted(run)
            time.sleep(SLICE_S)
            ended, last = accepted(run)
        slices.append((busy, (last - first) / (ended - started)))
    return slices


def prompts_per_step(run: PinnedRun) -> int:
    return load_settings(run.run_dir / "config.yaml").batch.prompts


def accepted(run: PinnedRun) -> tuple[float, float]:
    """(when, how many) results of the generator were accepted, as its last heartbeat said."""
    peer = run.peer("generator-0")
    return time.monotonic() - peer.get("seen_s", 0.0), peer.get("numbers", {}).get("results_accepted", 0.0)


def learner_slice(run: PinnedRun, other: Spinner, busy: bool) -> tuple[bool, float]:
    """Of the steps that began and ended in the slice."""
    with other.busy(busy):
        started, first = time.time(), len(steps_of(run.run_dir))
        run.until(lambda: len(steps_of(run.run_dir)) >= first + SLICE_STEPS, "steps of the learner alone", DEADLINE_S)
    rows = steps_of(run.run_dir)[first : first + SLICE_STEPS]
    whole = [row for row in rows if row["time"] - row["throughput/step_s"] >= started]
    samples = [row["throughput/samples_per_s"] * row["throughput/step_s"] for row in whole]
    return busy, sum(samples) / sum(row["throughput/step_s"] for row in whole)


# --- The loop ---------------------------------------------------------------------------------------------------------


def loop(out: Path, load: str, name: str, bound: int, steps: int) -> dict[str, float]:
    """What a whole run at this bound does, after its first steps."""
    with PinnedRun(out, out / name, *flags(out, load, name, bound, steps + NUM_SKIPPED)) as run:
        code = run.end(timeout_s=60 + 30 * steps)
        assert code == 0, f"{name} ended with {code}; it said:\n{run.said}"
    rows = steps_of(out / name)[NUM_SKIPPED:]
    seconds = sum(row["throughput/step_s"] for row in rows)
    samples = sum(row["throughput/samples_per_s"] * row["throughput/step_s"] for row in rows)
    waited = sum(row["time/waiting_for_trajectories"] * row["throughput/step_s"] for row in rows)
    pauses = [value for row in rows for key, value in row.items() if key.endswith("/pause_s")]
    return {
        "samples_per_s": samples / seconds,
        "learner_waiting": waited / seconds,
        "pause_s": median(pauses),
        "staleness_mean": fmean(row["staleness/mean"] for row in rows),
        "staleness_max": max(row["staleness/max"] for row in rows),
    }


def flags(out: Path, load: str, name: str, bound: int, steps: int) -> list[str]:
    own = ["--out", str(out), "--run-name", name, "--staleness.max", str(bound), "--steps", str(steps)]
    return [*COMMON, *LOADS[load], *own]


def print_table(result: Mapping[str, Any]) -> None:
    pace = result["samples_per_s"]
    print("\nsamples/s         other core idle   other core busy")
    for who in ("generator", "learner"):
        print(f"{who} alone {'':>{9 - len(who)}} {pace[f'{who}_alone']:16.1f} {pace[f'{who}_busy']:17.1f}")
    print(f"perfect overlap {pace['perfect_overlap']:35.1f}")
    print("\n  S  samples/s  of perfect  learner waits  pause  staleness mean  max")
    for row in result["loops"]:
        speed = f"{row['samples_per_s']:9.1f}  {row['of_perfect']:10.2f}  {row['learner_waiting']:13.1%}"
        staleness = f"{row['staleness_mean']:14.2f}  {row['staleness_max']:3.0f}"
        print(f"{row['max_staleness']:3}  {speed}  {1000 * row['pause_s']:3.0f} ms  {staleness}")


if __name__ == "__main__":
    sys.exit(main())
