"""Rows as they lie in files, in folders and on the Hugging Face Hub.

Runs in the broker. The only file that imports `datasets`, and pyarrow to read parquet. What their columns are is said
in `broker/columns.py`, which of them a run takes in `broker/records.py`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from protocol.errors import ConfigError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
EVAL_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")


class Table(NamedTuple):
    """Rows that lie together: in one file, or in one split of a dataset of the Hub. At least one."""

    place: str
    rows: list[Row]


def read_tables(source: str, *, evaluation: bool) -> list[Table]:
    """All rows of a file, a folder or a Hub name. Of a folder or a Hub dataset: the split that is wanted.

    An evaluation split that is not there gives no tables; anything else that is missing or empty raises ConfigError.
    """
    setting = f"data.{'eval' if evaluation else 'train'}"
    path = Path(source)
    if path.is_dir():
        files = _files_of_split(path, evaluation)
        tables = [Table(str(file), _read_file(file)) for file in files]
    elif path.is_file():
        tables = [Table(source, _read_file(path))]
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise ConfigError(f"expected a data file or folder at {source}, there is none; set {setting}")
    else:
        tables = _from_hub(source, evaluation)
    filled = [table for table in tables if table.rows]
    if not filled and not evaluation:
        raise ConfigError(f"expected at least one row in {source}, got none; set {setting}")
    return filled


def _files_of_split(folder: Path, evaluation: bool) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    held_out = [file for file in files if file.stem.lower().startswith(EVAL_SPLITS)]
    if evaluation:
        return held_out
    training = [file for file in files if file not in held_out]
    if not training:
        raise ConfigError(f"expected {', '.join(SUFFIXES)} files in {folder}, found none for training; set data.train")
    named = [file for file in training if file.stem.lower().startswith("train")]
    return named or training


def _read_file(path: Path) -> list[Row]:
    try:
        if path.suffix == ".jsonl":
            return _read_lines(path)
        if path.suffix == ".json":
            return _listed(json.loads(path.read_text(encoding="utf-8-sig")), path)
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(path).to_pylist())
    except (ValueError, OSError, NotImplementedError, csv.Error) as error:  # pyarrow's errors are of these kinds
        hint = "; rows with a line each belong into a .jsonl file" if str(error).startswith("Extra data") else ""
        raise ConfigError(f"cannot read {path}: {error}{hint}; mend or remove that file, or name another") from None
    raise ConfigError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {path}; set data.train")


def _read_lines(path: Path) -> list[Row]:
    found = []
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut inside texts, at U+2028
    for number, line in enumerate(lines, start=1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
    return _listed(found, path)


def _read_csv(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two columns are called {repeated!r}")
        rows = []
        for number, row in enumerate(reader):
            if None in row or None in row.values():  # more fields than names, or fewer
                raise ValueError(f"row {number} has other columns than the header's {len(names)}: {', '.join(names)}")
            rows.append(dict(row))
        return rows


def _listed(value: Any, path: Path) -> list[Row]:
    rows = list[Any](value) if isinstance(value, list) else [value]
    number = next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None)
    if number is not None or not isinstance(value, list):
        where, odd = ("", value) if number is None else (f"row {number} of ", rows[number])
        raise ConfigError(f"expected one object per row, got {type(odd).__name__} in {where}{path}; see data.train")
    return rows


def _from_hub(source: str, evaluation: bool) -> list[Table]:
    """NAME or NAME:SUBSET. A dataset with one subset needs no name for it; openai/gsm8k has its questions in `main`."""
    from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

    name, _, subset = source.partition(":")
    try:
        subsets: Sequence[str] = get_dataset_config_names(name)
        subset = subset or ("main" if "main" in subsets else subsets[0])
        splits = get_dataset_split_names(name, subset)
        wanted = EVAL_SPLITS if evaluation else ("train",)
        split = next((split for split in wanted if split in splits), None)
        rows = [dict(row) for row in load_dataset(name, subset, split=split)] if split else []
    except Exception as error:  # `datasets` raises whatever its storage layers raise
        raise ConfigError(
            f"expected data.{'eval' if evaluation else 'train'} to be files, folders or Hugging Face datasets that can "
            f"be reached, got {source} ({type(error).__name__}); without network give a folder of .jsonl or .parquet "
            "files with --dataset"
        ) from None
    if split is None and not evaluation:
        raise ConfigError(f"expected a train split in {source}, it has {', '.join(splits)}; set data.train")
    return [Table(f"{source}, split {split}", rows)]
