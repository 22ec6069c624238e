"""Rows as they lie in files and folders."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from broker.dataset import Row, read_tables
from protocol.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(5)]


def load_rows(source: str, *, evaluation: bool) -> list[Row]:
    return [row for table in read_tables(source, evaluation=evaluation) for row in table.rows]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert load_rows(str(write(tmp_path / f"rows{suffix}", ROWS)), evaluation=False) == ROWS


def test_a_line_separator_inside_a_text_does_not_cut_a_row(tmp_path: Path) -> None:
    rows = [{"question": "one\u2028two\x85three", "answer": "#### 1"}]
    assert load_rows(str(write(tmp_path / "rows.jsonl", rows)), evaluation=False) == rows


def test_a_folder_is_split_by_the_names_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.jsonl", ROWS[:2])
    write(tmp_path / "train-00001.parquet", ROWS[2:4])
    write(tmp_path / "test.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("no rows")
    assert load_rows(str(tmp_path), evaluation=False) == ROWS[:4]
    assert load_rows(str(tmp_path), evaluation=True) == ROWS[4:]


def test_a_folder_without_a_held_out_file_has_no_evaluation_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    assert load_rows(str(tmp_path), evaluation=False) == ROWS
    assert load_rows(str(tmp_path), evaluation=True) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", "", "expected at least one row"),
        ("rows.jsonl", '{"question": "a"}\n\n{"question": ', "cannot read .*: line 3 is not JSON: .* mend or remove"),
        ("rows.jsonl", '{"question": "a"}\n[1, 2]', "expected one object per row, got list in row 1 of"),
        ("rows.json", '{"question": "a"}', "expected one object per row, got dict in "),
        ("rows.json", '{"question": "a"}\n{"question": "b"}', "a line each belong into a .jsonl file; mend"),
        ("rows.csv", "question,answer\na,1\nb\n", "row 1 has other columns than the header's 2: question, answer"),
        ("rows.csv", "question,answer\na,1,2\n", "row 0 has other columns than the header's 2"),
        ("rows.csv", "question,question\na,1\n", "two columns are called 'question'"),
        ("rows.csv", "question\n" + "a" * 200_000, "cannot read .*field larger than field limit"),
        ("rows.csv", 'question\n"a', "cannot read .*unexpected end of data"),
        ("rows.parquet", "not parquet", "cannot read .*; mend or remove that file, or name another"),
        ("rows.txt", "a", "ends in .jsonl, .json, .parquet, .csv"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_by_name(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said) as raised:
        load_rows(str(tmp_path / name), evaluation=False)
    assert name in str(raised.value)


def test_a_path_that_is_not_there_is_no_name_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a data file or folder at .*none\.jsonl, there is none; set data"):
        load_rows(str(tmp_path / "none.jsonl"), evaluation=False)


def test_a_name_that_the_hub_cannot_give_says_what_to_do_without_network(tmp_path: Path) -> None:
    code = "from broker.dataset import read_tables; read_tables('nobody/nothing', evaluation=False)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "ConfigError" in ended.stderr
    assert "without network give a folder of .jsonl or .parquet files" in ended.stderr


def test_of_a_dataset_of_the_hub_the_wanted_split_is_read(tmp_path: Path) -> None:
    """The library itself, over a folder that lies here as a dataset lies on the Hub."""
    for subset in ("main", "other"):
        write(tmp_path / "named" / subset / "train.jsonl", ROWS[:3])
        write(tmp_path / "named" / subset / "test.jsonl", ROWS[3:] if subset == "main" else ROWS[:1])
    write(tmp_path / "held" / "test.jsonl", ROWS[:1])
    subsets = [{"config_name": name, "data_dir": name} for name in ("other", "main")]
    (tmp_path / "named" / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n")
    code = (
        "from broker.dataset import _from_hub\n"
        "for evaluation in (False, True): print([len(t.rows) for t in _from_hub('named', evaluation)])\n"
        "print(_from_hub('named:other', True)[0].place)\n"
        "_from_hub('held', False)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout.splitlines() == ["[3]", "[2]", "named:other, split test"], ended.stderr
    assert "ConfigError: expected a train split in held, it has test; set data.train" in ended.stderr


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\ufeffquestion,answer\na,1\n", encoding="utf-8")
    assert load_rows(str(tmp_path / "rows.csv"), evaluation=False) == [{"question": "a", "answer": "1"}]


def test_rows_are_told_apart_by_their_file(tmp_path: Path) -> None:
    files = [write(tmp_path / f"train-{n}.jsonl", ROWS[n : n + 1]) for n in range(2)]
    (tmp_path / "train-2.jsonl").touch()
    assert read_tables(str(tmp_path), evaluation=False) == [(str(file), [ROWS[n]]) for n, file in enumerate(files)]
