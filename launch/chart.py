"""Curves as text: a sparkline for one line, a chart for a page, and text made safe to print. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille cell, by row and column."""


def printable(text: str) -> str:
    """The text without anything that a terminal obeys: control and invisible characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of bars; more values than `width` are averaged."""
    means = _means(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(_BARS[round((value - low) / (high - low) * 7) if high > low else 3] for value in means)


def chart(xs: Sequence[float], ys: Sequence[float], width: int, height: int) -> list[str]:
    """The curve through the points in braille dots: `height` lines, the scale on the left, the x range below."""
    low, high = min(ys), max(ys)
    labels = [""] * height
    labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
    if high == low:
        labels[0] = labels[-1] = ""
        labels[height // 2] = f"{high:.3g}"
    margin = max(len(label) for label in labels)
    cells = [[0] * max(1, width - margin - 2) for _ in range(height)]
    columns, rows = len(cells[0]) * 2, height * 4
    first, last = xs[0], xs[-1]
    for column in range(columns):
        x = first + (last - first) * column / max(1, columns - 1)
        y = _value_at(x, xs, ys)
        row = round((high - y) / (high - low) * (rows - 1)) if high > low else rows // 2
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    lines = [
        f"{label:>{margin}} ┤{''.join(chr(0x2800 + c) for c in row)}" for label, row in zip(labels, cells, strict=True)
    ]
    return [*lines, f"{'':>{margin}}  {first:<g}{last:>{len(cells[0]) - len(f'{first:<g}')}g}"]


def _means(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [len(values) * i // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _value_at(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between the two neighbouring points."""
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(xs, ys, strict=True)):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return ys[-1]
