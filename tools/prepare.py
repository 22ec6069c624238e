"""Writes a dataset in verl's parquet schema: `python tools/prepare.py gsm8k --from FOLDER --out FOLDER`.

The rows are those of verl's own recipe, in the order of the source, so files of either can take each other's place:
FOLDER/train.parquet (7,473 rows) and FOLDER/test.parquet (1,319). `--data.train FOLDER` reads them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.errors import ConfigError, Exit, TetherError

GSM8K = "openai/gsm8k"
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("gsm8k",), help="which dataset")
    parser.add_argument("--from", dest="source", default=GSM8K, help=f"folder or Hugging Face name (default: {GSM8K})")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    args = parser.parse_args(argv)
    try:
        prepare(args.source, args.out)
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(Exit.DONE)


def prepare(source: str, out: Path) -> None:
    """Write both splits, or nothing. Raises ConfigError naming the first row that is none of GSM8K's."""
    from pyarrow import Table, parquet

    tables = {
        split: Table.from_pylist(rows_of(source, split), schema()) for split in ("train", "test")
    }  # all rows are good before a file is written
    out.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        parquet.write_table(table, out / f"{split}.parquet")
        print(f"{out / split}.parquet: {table.num_rows} rows")


def rows_of(source: str, split: str) -> list[dict[str, Any]]:
    """One split, in verl's schema."""
    from broker.dataset import read_tables

    tables = read_tables(source, evaluation=split == "test")
    if not tables:
        raise ConfigError(f"expected a test split in {source}, found none; add a file test.jsonl, or set --from")
    rows: list[dict[str, Any]] = []
    for table in tables:
        for number, row in enumerate(table.rows):
            rows.append(verl_row(row, split, len(rows), f"row {number} of {table.place}"))
    return rows


def verl_row(row: dict[str, Any], split: str, index: int, place: str) -> dict[str, Any]:
    """A question with its worked answer becomes chat messages with the bare number as ground truth."""
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str) or not row[column]:
            raise ConfigError(f"expected a text in column {column}, {place} has {row.get(column)!r}; mend that row")
    found = _ANSWER.search(row["answer"])
    if found is None:
        raise ConfigError(
            f'expected a number after "#### " in column answer, {place} ends {row["answer"][-60:]!r}; mend that row'
        )
    return {
        "data_source": GSM8K,
        "prompt": [{"role": "user", "content": row["question"] + INSTRUCTION}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": found[1].replace(",", "")},
        "extra_info": {"split": split, "index": index, "answer": row["answer"], "question": row["question"]},
    }


def schema() -> Any:
    """verl's columns; within a struct in the order of their names, as `datasets` writes them there."""
    from pyarrow import field, int64, list_, string, struct
    from pyarrow import schema as columns

    def texts(*names: str) -> list[Any]:
        return [field(name, string()) for name in names]

    return columns(
        [
            ("data_source", string()),
            ("prompt", list_(struct(texts("content", "role")))),
            ("ability", string()),
            ("reward_model", struct(texts("ground_truth", "style"))),
            ("extra_info", struct([*texts("answer"), field("index", int64()), *texts("question", "split")])),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
