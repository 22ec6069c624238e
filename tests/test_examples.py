"""Rows as token ids for `tools/sft.py`: read as a run reads its own, in every format and convention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import Table, parquet
from tokenizers import Tokenizer

from protocol.examples import read_examples
from tests.models import EOS, make_tiny_qwen2
from tools import examples

QUESTION, WORKED = "w3 w4", "w5 w6"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_qwen2(folder, tied=True)
    return folder


def texts(model: Path, out: Path, *words: str) -> list[tuple[str, str]]:
    """Prompts and answers, as written for this command line."""
    assert examples.main(["--model", str(model), "--out", str(out), *words]) == 0
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    pairs = read_examples(out)
    assert all(pair.answer_tokens[-1] == EOS for pair in pairs)
    return [(tokenizer.decode(p.tolist()), tokenizer.decode(a.tolist())) for p, a in pairs]


def test_the_columns_of_verls_warm_start_may_be_named(model: Path, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": f"{QUESTION} w9"}],
        "reward_model": {"ground_truth": "w6", "style": "rule"},
        "extra_info": {"question": QUESTION, "answer": WORKED},
    }
    parquet.write_table(Table.from_pylist([row]), tmp_path / "train.parquet")
    named = ("--prompt-column", "extra_info.question", "--answer-column", "extra_info.answer")
    assert texts(model, tmp_path / "a.npz", "--data", str(tmp_path), *named) == [(QUESTION, WORKED)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_of_every_format_are_read(model: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    row = {"task": QUESTION, "done": WORKED}
    file.write_text({"json": json.dumps([row]), "csv": f"task,done\n{QUESTION},{WORKED}"}.get(suffix, json.dumps(row)))
    named = ("--prompt-column=task", "--answer-column=done", "--suffix= w7", "--system=w8")
    assert texts(model, tmp_path / "a.npz", "--data", str(file), *named) == [(f"w8 {QUESTION} w7", WORKED)]


def test_rows_without_a_text_answer_are_counted_and_none_at_all_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"query": QUESTION, "response": WORKED}, {"query": QUESTION, "response": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(texts(model, tmp_path / "a.npz", "--data", str(file))) == 1
    assert "1 rows have no text answer, and are left out" in capsys.readouterr().out
    file.write_text(json.dumps(rows[1]))
    assert examples.main(["--model", str(model), "--data", str(file), "--out", str(tmp_path / "b.npz")]) == 2
    assert f"expected rows with a text answer in {file}, found none; set --data or" in capsys.readouterr().err
