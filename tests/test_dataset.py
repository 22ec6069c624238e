"""Rows from files and folders, and which of their columns is what."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from broker.dataset import Columns, check_prompts, columns_for_rewards, load_rows, recognise
from protocol.errors import ConfigError
from protocol.sections import DataConfig

ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(5)]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 71 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 3},
}


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
        ("rows.jsonl", '{"question": "a"}\n{"question": ', "cannot read"),
        ("rows.jsonl", '{"question": "a"}\n[1, 2]', "expected one object per row"),
        ("rows.json", '{"question": "a"}', "expected one object per row"),
        ("rows.parquet", "not parquet", "cannot read"),
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
    code = "from broker.dataset import load_rows; load_rows('nobody/nothing', evaluation=False)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "ConfigError" in ended.stderr
    assert "without network give a folder of .jsonl or .parquet files" in ended.stderr


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ROWS[0], Columns("question", "answer")),
        (VERL, Columns("prompt", "reward_model")),
        ({"prompt": "p", "difficulty": 3}, Columns("prompt", "")),
        ({"messages": [{"role": "user", "content": "p"}], "solution": "s"}, Columns("messages", "solution")),
        ({"query": "q", "solution": "s"}, Columns("query", "solution")),
    ],
    ids=["gsm8k", "verl", "trl", "ms-swift messages", "ms-swift query"],
)
def test_conventions_are_recognised_by_their_columns(row: dict[str, Any], columns: Columns) -> None:
    assert recognise(row, DataConfig()) == columns


def test_a_setting_overrides_what_is_recognised() -> None:
    row = {"question": "a", "answer": "b", "task": "c", "gold": "d"}
    assert recognise(row, DataConfig(prompt_column="task", answer_column="gold")) == Columns("task", "gold")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"expected a prompt column \(one of prompt, .*the rows have text, label; set data.prompt_column"),
        ({"prompt_column": "nope"}, r"expected a prompt column \(nope\), the rows have text, label"),
        (
            {"prompt_column": "text", "answer_column": "nope"},
            r"expected an answer column nope, the rows have text, label",
        ),
    ],
)
def test_a_missing_column_is_named_beside_those_that_are_there(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recognise({"text": "a", "label": "b"}, DataConfig(**settings))


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"answer": "b"}, "only the columns answer"),
        ({"question": None}, "None"),
        ({"question": ""}, "''"),
        ({"question": 12}, "12"),
        ({"question": ["a"]}, r"\['a'\]"),
        ({"question": [{"role": "assistant", "content": "a"}]}, "assistant"),
    ],
)
def test_a_row_without_a_prompt_is_named_before_the_run(row: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=f"column question of every row, row 1 of rows has .*{seen}"):
        check_prompts([{"question": "fine"}, row], Columns("question", "answer"), "rows")


def test_rewards_see_every_column_but_the_prompt() -> None:
    row = ROWS[0] | {"level": 2}
    assert columns_for_rewards(row, Columns("question", "answer")) == {**row, "prompt": row["question"]}


def test_the_ground_truth_of_verl_is_also_the_answer() -> None:
    seen = columns_for_rewards(VERL, Columns("prompt", "reward_model"))
    assert seen["answer"] == seen["ground_truth"] == "72"
    assert seen["reward_model"] == VERL["reward_model"]
    assert (seen["data_source"], seen["extra_info"]) == ("openai/gsm8k", {"index": 3})


def test_what_json_cannot_say_reaches_rewards_as_text() -> None:
    day = datetime.date(2024, 2, 29)
    assert columns_for_rewards({"question": "a", "day": day}, Columns("question", ""))["day"] == "2024-02-29"
