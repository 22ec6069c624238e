"""GSM8K in verl's schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from broker.columns import recognise
from broker.dataset import read_tables
from protocol.errors import Exit
from protocol.sections import DataConfig
from tools.prepare import main

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"question": "How many – 1 or 2?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    {"question": "A loss?", "answer": "#### -7"},
    {"question": "Many?", "answer": "All of them.\n#### 1,080"},
]


def source(folder: Path, rows: list[dict[str, str]], held_out: list[dict[str, str]]) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    return str(folder)


def test_gsm8k_becomes_verls_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = source(tmp_path / "raw", ROWS, ROWS[2:]), tmp_path / "made"
    assert main(("gsm8k", "--from", given, "--out", str(out))) == Exit.DONE
    assert capsys.readouterr().out == f"{out}/train.parquet: 3 rows\n{out}/test.parquet: 1 rows\n"
    table = pyarrow.parquet.read_table(out / "train.parquet")
    assert table.to_pylist()[2] == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "content": 'Many? Let\'s think step by step and output the final answer after "####".',
                "role": "user",
            }
        ],
        "ability": "math",
        "reward_model": {"ground_truth": "1080", "style": "rule"},
        "extra_info": {"answer": "All of them.\n#### 1,080", "index": 2, "question": "Many?", "split": "train"},
    }
    assert [row["reward_model"]["ground_truth"] for row in table.to_pylist()] == ["2", "-7", "1080"]
    assert pyarrow.parquet.read_table(out / "test.parquet")["extra_info"].to_pylist()[0]["split"] == "test"


def test_the_columns_have_verls_names_and_types_in_verls_order(tmp_path: Path) -> None:
    main(("gsm8k", "--from", source(tmp_path / "raw", ROWS, ROWS), "--out", str(tmp_path / "made")))
    for split in ("train", "test"):
        schema = pyarrow.parquet.read_schema(tmp_path / "made" / f"{split}.parquet")
        assert [(field.name, str(field.type)) for field in schema] == [
            ("data_source", "string"),
            ("prompt", "list<element: struct<content: string, role: string>>"),
            ("ability", "string"),
            ("reward_model", "struct<ground_truth: string, style: string>"),
            ("extra_info", "struct<answer: string, index: int64, question: string, split: string>"),
        ]


def test_a_run_reads_what_was_written(tmp_path: Path) -> None:
    main(("gsm8k", "--from", source(tmp_path / "raw", ROWS, ROWS[:1]), "--out", str(tmp_path / "made")))
    (train,) = read_tables(str(tmp_path / "made"), evaluation=False)
    (test,) = read_tables(str(tmp_path / "made"), evaluation=True)
    assert (len(train.rows), len(test.rows)) == (3, 1)
    assert recognise(train.rows[0], DataConfig()).convention == "verl's columns"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "two"}, "after \"#### \" in column answer, row 1 of {file} ends 'two'; mend"),
        ({"question": "", "answer": "#### 2"}, "expected a text in column question, row 1 of {file} has ''; mend"),
        ({"question": "q"}, "expected a text in column answer, row 1 of {file} has None; mend"),
    ],
)
def test_a_row_that_is_none_of_gsm8ks_is_told_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], said: str
) -> None:
    given = source(tmp_path / "raw", ROWS, [ROWS[0], row])
    assert main(("gsm8k", "--from", given, "--out", str(tmp_path / "made"))) == Exit.SETTINGS
    assert said.format(file=tmp_path / "raw" / "test.jsonl") in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_folder_without_a_test_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = source(tmp_path / "raw", ROWS, [])
    assert main(("gsm8k", "--from", given, "--out", str(tmp_path / "made"))) == Exit.SETTINGS
    assert f"expected a test split in {given}, found none; add a file test.jsonl" in capsys.readouterr().err


def test_it_is_started_by_its_path(tmp_path: Path) -> None:
    given = source(tmp_path / "raw", ROWS, ROWS)
    command = [sys.executable, str(ROOT / "tools" / "prepare.py"), "gsm8k", "--from", given, "--out", "made"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.endswith("test.parquet: 3 rows\n"), ended.stderr
    assert (tmp_path / "made" / "train.parquet").is_file()
