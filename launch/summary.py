"""What a run has come to: its curves in the terminal and as a picture, the same questions answered before and after.

Run by `launch/cluster.py` at the end of every run, whatever its end was. Sources are the run's own files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.chart import chart, printable
from launch.history import History, Row
from launch.scores import changes

NUM_SAMPLES = 2
MAX_TEXT = 400


def summary(run_dir: Path, width: int) -> list[str]:
    """The lines to print; writes `curves.png` beside the run's other files. Empty for a run without a step."""
    history = History(run_dir)
    history.read()
    if not history.steps:
        return []
    lines = [*_curve("reward", history.steps, "step", "reward/mean", width)]
    lines += _curve("held-out accuracy", history.evaluations, "version", "accuracy", width)
    evaluations = [row for row in history.evaluations if row["accuracy"] is not None]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        lines += [_gain(first, last), *changes(first, last), "", *_before_and_after(first, last, width)]
    lines.append(
        f"picture: {picture}" if (picture := draw_picture(run_dir, history)) else "picture: none, matplotlib is missing"
    )
    return [*lines, f"curves:  tensorboard --logdir {run_dir / 'tensorboard'}"]


def draw_picture(run_dir: Path, history: History) -> Path | None:
    """`curves.png` in the run's folder; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(run_dir.name, parse_math=False)
    reward, accuracy = figure.subplots(1, 2)
    panels = ((reward, history.steps, "step", "reward/mean"), (accuracy, history.evaluations, "version", "accuracy"))
    for axes, rows, x, y in panels:
        xs, ys = _points(rows, x, y)
        axes.plot(xs, ys, marker="o" if len(xs) < 30 else "", linewidth=1.5)
        axes.set_xlabel("policy version" if x == "version" else x)
        axes.set_ylabel("held-out accuracy" if y == "accuracy" else "mean reward of a step")
        axes.grid(alpha=0.3)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _curve(title: str, rows: Sequence[Row], x: str, y: str, width: int) -> list[str]:
    xs, ys = _points(rows, x, y)
    return [f"{title} by {x}", *chart(xs, ys, min(width, 100), 6), ""] if len(xs) > 1 else []


def _points(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    found = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    return [a for a, _ in found], [b for _, b in found]


def _gain(first: Row, last: Row) -> str:
    points = 100 * (last["accuracy"] - first["accuracy"])
    before = f"{first['accuracy']:.1%} at version {first['version']}"
    after = f"{last['accuracy']:.1%} at version {last['version']}"
    return f"held-out accuracy: {before}, {after} ({points:+.1f} points, {last['num_prompts']} prompts)"


def _before_and_after(first: Row, last: Row, width: int) -> Iterator[str]:
    """Questions of both evaluations; those that were learned come first."""
    before = {sample["prompt"]: sample for sample in first["samples"]}
    pairs = [(before[sample["prompt"]], sample) for sample in last["samples"] if sample["prompt"] in before]
    pairs.sort(key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    for old, new in pairs[:NUM_SAMPLES]:
        lines = ("question  ", _text(old["prompt"])), ("  before  ", _answer(old)), ("  after   ", _answer(new))
        for label, text in lines:
            yield from textwrap.wrap(text, width, initial_indent=label, subsequent_indent=" " * len(label))
        yield ""


def _answer(sample: Mapping[str, Any]) -> str:
    return f"[reward {sample['reward']:g}] {_text(sample['completion'])}"


def _text(text: str) -> str:
    """A model's words on one line."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= MAX_TEXT else f"{flat[:MAX_TEXT]} ..."
