"""The rows of a run: of every source the wanted split, its columns recognised, its rows checked, and so many taken.

Runs in the broker. Pure but for the reading, which is `broker/dataset.py`. That the same settings give the same rows
in the same order, and so a cursor that resumes exactly, rests on `sample`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from broker.columns import BEFORE_QUERY, Columns, recognise, with_fields
from broker.dataset import Row, read_tables
from broker.row_checks import check_rows
from protocol.sections import DataConfig
from protocol.sources import Source


class Record(NamedTuple):
    """One row, and what its columns are: sources of different conventions may train together."""

    row: Row
    columns: Columns


class Records(NamedTuple):
    """All rows of a setting, one sentence for each source (how many, and which column is what), each row's source."""

    records: list[Record]
    notes: list[str]
    names: list[str]


def load_records(
    sources: Sequence[Source], settings: DataConfig, rewards: Iterable[str], *, evaluation: bool, seed: int
) -> Records:
    """Raises ConfigError for a source that cannot be read, and for the first row that cannot be used."""
    used, found, notes, names = list(rewards), list[Record](), list[str](), list[str]()
    for source in sources:
        tables = [with_fields(table, settings) for table in read_tables(source.name, evaluation=evaluation)]
        if not tables:
            continue
        rows = [row for table in tables for row in table.rows]
        later = {name: None for name in BEFORE_QUERY if name not in rows[0] and any(name in row for row in rows)}
        columns = recognise(rows[0] | later, settings, used)
        check_rows(tables, columns, used)
        taken = range(len(rows)) if source.num_rows is None else sample(len(rows), source.num_rows, seed)
        found += [Record(rows[number], columns) for number in taken]
        names += [source.name] * len(taken)
        of = "" if source.num_rows is None else f" of {len(rows)}"
        notes.append(f"{len(taken)}{of} rows from {source.name}: {columns}")
    return Records(found, notes, names)


def sample(num_rows: int, count: int, seed: int) -> list[int]:
    """`count` of so many rows, in their order: without replacement, beyond their number whole repeats and the rest.

    The same as ms-swift's `#N`.
    """
    repeats, rest = divmod(count, num_rows)
    generator = np.random.Generator(np.random.PCG64([seed, 0, 1]))  # the orders of passes are drawn from [seed, pass]
    return [*list(range(num_rows)) * repeats, *sorted(generator.permutation(num_rows)[:rest].tolist())]
