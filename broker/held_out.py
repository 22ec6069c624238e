"""Which held-out rows an evaluation takes, and what their sources are called. Runs in the broker; pure.

A row's source is its `data_source` column, as in verl; without one, the file, folder or Hub name that it came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import PurePath

from broker.dataset import Row

COLUMN = "data_source"
MAX_SOURCES = 64  # each has curves of its own
MAX_LABEL = 64


def source_labels(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """What each row's source is called. `names`: where each came from, which counts beyond `MAX_SOURCES` sources."""
    short = short_names(list(dict.fromkeys(names)))
    places = [short[name] for name in names]
    labels = [str(row.get(COLUMN) or place)[:MAX_LABEL] for row, place in zip(rows, places, strict=True)]
    return labels if len(set(labels)) <= MAX_SOURCES else places


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest end of each path that tells it from the others; what is no path here is a name of the Hub."""
    parts = {name: PurePath(name).parts for name in names if os.path.isabs(name)}
    found = {name: name[:MAX_LABEL] for name in names}
    for name, own in parts.items():
        length = next((n for n in range(1, len(own)) if sum(own[-n:] == p[-n:] for p in parts.values()) == 1), len(own))
        found[name] = "/".join(own[-length:])[-MAX_LABEL:]
    return found


def in_turn(labels: Sequence[str]) -> Iterator[int]:
    """Numbers of the rows, one of each source at a time, each source's in their order."""
    by_label: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        by_label.setdefault(label, []).append(number)
    for turn in zip_longest(*by_label.values()):
        yield from (number for number in turn if number is not None)
