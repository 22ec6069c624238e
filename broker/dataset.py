"""Rows of a dataset, from files or from the Hugging Face Hub, and which of their columns is what.

Runs in the broker. The only file that imports `datasets`, and pyarrow for parquet. Four conventions are recognised by
their column names: GSM8K's (question, answer), verl's (prompt, reward_model), TRL's (prompt and anything else) and
ms-swift's (messages or query, solution); a setting overrides it. Rewards see every column of a row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from protocol.errors import ConfigError
from protocol.sections import DataConfig

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
PROMPT_COLUMNS = ("prompt", "messages", "question", "query", "problem", "instruction")
ANSWER_COLUMNS = ("answer", "solution", "reward_model", "ground_truth", "response", "target")
EVAL_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")


class Columns(NamedTuple):
    """Which column holds the prompt, and which the reference answer ("" if there is none)."""

    prompt: str
    answer: str


def load_rows(source: str, *, evaluation: bool) -> list[Row]:
    """All rows of a file, a folder or a Hub name. Of a folder or a Hub dataset: the split that is wanted.

    An evaluation split that is not there gives no rows; anything else that is missing or empty raises ConfigError.
    """
    path = Path(source)
    if path.is_dir():
        files = _files_of_split(path, evaluation)
        rows = [row for file in files for row in _read_file(file)]
    elif path.is_file():
        rows = _read_file(path)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise ConfigError(
            f"expected a data file or folder at {source}, there is none; set data.{'eval' if evaluation else 'train'}"
        )
    else:
        rows = _from_hub(source, evaluation)
    if not rows and not evaluation:
        raise ConfigError(f"expected at least one row in {source}, got none; set data.train")
    return rows


def recognise(row: Row, settings: DataConfig) -> Columns:
    """Which columns of rows like this one are prompt and answer.

    Raises ConfigError naming the columns that are there.
    """
    prompt = settings.prompt_column or next((name for name in PROMPT_COLUMNS if name in row), "")
    answer = settings.answer_column or next((name for name in ANSWER_COLUMNS if name in row), "")
    if prompt not in row:
        wanted = prompt or f"one of {', '.join(PROMPT_COLUMNS)}"
        raise ConfigError(
            f"expected a prompt column ({wanted}), the rows have {', '.join(row)}; set data.prompt_column"
        )
    if settings.answer_column and answer not in row:
        raise ConfigError(f"expected an answer column {answer}, the rows have {', '.join(row)}; set data.answer_column")
    return Columns(prompt, answer)


def check_prompts(rows: Sequence[Row], columns: Columns, source: str) -> None:
    """Raises ConfigError naming the first row whose prompt is neither text nor chat messages."""
    for number, row in enumerate(rows):
        prompt = row.get(columns.prompt)
        if not prompt or not (isinstance(prompt, str) or _are_messages(prompt)):
            seen = repr(prompt)[:60] if columns.prompt in row else f"only the columns {', '.join(row)}"
            raise ConfigError(
                f"expected text or chat messages in column {columns.prompt} of every row, row {number} of {source} has "
                f"{seen}; remove that row, or set data.prompt_column"
            )


def columns_for_rewards(row: Row, columns: Columns) -> Row:
    """Every column as plain JSON; the question also under the name `prompt`, the reference under `answer`."""
    seen = {"prompt": row[columns.prompt]} | dict(row)
    answer = row.get(columns.answer)
    if isinstance(answer, dict) and "ground_truth" in answer:  # verl's reward_model
        seen.setdefault("ground_truth", answer["ground_truth"])
        answer = answer["ground_truth"]
    if answer is not None:
        seen.setdefault("answer", answer)
    return dict(json.loads(json.dumps(seen, default=str)))  # parquet has dates, the Hub has images


def _are_messages(value: Any) -> bool:
    """Chat messages with something to answer."""
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        return False
    return bool(value[0]["role"] != "assistant")


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
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut inside texts, at U+2028
            return _listed([json.loads(line) for line in lines if line.strip()], path)
        if path.suffix == ".json":
            return _listed(json.loads(path.read_text(encoding="utf-8")), path)
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return [dict(row) for row in csv.DictReader(file)]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(path).to_pylist())
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    raise ConfigError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {path}; set data.train")


def _listed(value: Any, path: Path) -> list[Row]:
    odd = value if not isinstance(value, list) else next((row for row in value if not isinstance(row, dict)), None)
    if odd is not None:
        raise ConfigError(f"expected one object per row in {path}, got {type(odd).__name__}; see data.train")
    return list(value)


def _from_hub(source: str, evaluation: bool) -> list[Row]:
    """NAME or NAME:SUBSET. A dataset with one subset needs no name for it; openai/gsm8k has its questions in `main`."""
    from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

    name, _, subset = source.partition(":")
    try:
        subsets: Sequence[str] = get_dataset_config_names(name)
        subset = subset or ("main" if "main" in subsets else subsets[0])
        splits = get_dataset_split_names(name, subset)
        wanted = EVAL_SPLITS if evaluation else ("train",)
        split = next((split for split in wanted if split in splits), None)
        return [dict(row) for row in load_dataset(name, subset, split=split)] if split else []
    except Exception as error:  # `datasets` raises whatever its storage layers raise
        raise ConfigError(
            f"expected data.train to be a file, a folder or a Hugging Face dataset that can be reached, got {source} "
            f"({type(error).__name__}); without network give a folder of .jsonl or .parquet files with --dataset"
        ) from None
