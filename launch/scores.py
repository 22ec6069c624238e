"""An evaluation in the terminal: its table, and what has changed since the first one. Pure.

A row is a line of evaluations.jsonl; its `scores` are described in `broker/scores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.chart import printable
from launch.history import Row

ALL = ""  # the source of scores that are over all sources


def score_table(row: Row) -> list[str]:
    """By source and function: counts, mean@k with its 95% interval, pass@j and maj@k."""
    scores = shown_scores(row)
    names = list(dict.fromkeys(name for score in scores for name in score["metrics"]))
    mean, *others = names or [""]
    heads = [
        "source",
        "function",
        "prompts",
        "completions",
        "value",
        *([mean, "95% interval"] if mean else []),
        *others,
    ]
    cells = [heads]
    for score in scores:
        metrics = score["metrics"]
        interval = f"{score['low']:.1%} to {score['high']:.1%}" if metrics else "nothing was scored"
        value = "" if score["value"] is None else f"{score['value']:.3f}"
        counts = [str(score["prompts"]), str(score["completions"]), value]
        shown = [percent(metrics.get(mean)), interval] if mean else []
        named = [printable(score["source"] or "all"), printable(score["function"])]
        cells.append([*named, *counts, *shown, *(percent(metrics.get(name)) for name in others)])
    return _aligned(cells)


def shown_scores(row: Row) -> list[Mapping[str, Any]]:
    """Those over all sources say nothing of their own where there is only one."""
    scores = list(row.get("scores", ()))
    has_several = len({score["source"] for score in scores}) > 2
    return [score for score in scores if has_several or score["source"] != ALL]


def overall(row: Row, function: str = "") -> Mapping[str, Any] | None:
    """The scores of a function over all sources; "": of the first, which decides accuracy."""
    found = (s for s in row.get("scores", ()) if s["source"] == ALL and function in ("", s["function"]))
    return next(found, None)


def changes(first: Row, last: Row) -> Iterator[str]:
    """What became of the numbers of k completions, one line for each source and function that both have.

    The first is not said of plain accuracy, which has a line of its own.
    """
    k = last.get("samples_per_prompt", 1)
    before = {(score["source"], score["function"]): score["metrics"] for score in first.get("scores", ())}
    for number, score in enumerate(shown_scores(last)):
        was, now = before.get((score["source"], score["function"]), {}), score["metrics"]
        names = [name for name in (f"mean@{k}", f"pass@{k}", f"maj@{k}") if name in was and name in now]
        if names and (number > 0 or k > 1):
            parts = (
                f"{name} {was[name]:.1%}, {now[name]:.1%} ({100 * (now[name] - was[name]):+.1f})" for name in names
            )
            place = " ".join(filter(None, (printable(score["source"]), printable(score["function"]))))
            yield f"  {place}: {'; '.join(parts)}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text; the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
