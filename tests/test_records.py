"""Rows of several sources, and so many of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.columns import messages_of
from broker.records import Records, load_records, sample
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.sections import DataConfig
from protocol.settings import Value, build
from protocol.sources import Source, absolute_sources, parse_sources


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def load(text: str, *, seed: int = 0, evaluation: bool = False) -> Records:
    return load_records(parse_sources(text), DataConfig(), ("gsm8k",), evaluation=evaluation, seed=seed)


@given(num_rows=st.integers(1, 40), count=st.integers(1, 200), seed=st.integers(0, 1 << 40))
def test_a_sample_takes_every_row_as_often_as_any_other_but_for_one(num_rows: int, count: int, seed: int) -> None:
    taken = sample(num_rows, count, seed)
    repeats, rest = divmod(count, num_rows)
    counted = Counter(taken)
    assert len(taken) == count
    assert taken[: repeats * num_rows] == list(range(num_rows)) * repeats
    assert sum(times == repeats + 1 for times in counted.values()) == rest
    assert set(counted.values()) <= {repeats, repeats + 1}
    assert taken == sample(num_rows, count, seed)


def test_another_seed_takes_other_rows_and_every_row_is_taken_by_some() -> None:
    samples = [tuple(sample(20, 5, seed)) for seed in range(40)]
    assert len(set(samples)) > 30
    assert {row for taken in samples for row in taken} == set(range(20))


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("openai/gsm8k", [Source("openai/gsm8k")]),
        ("AI-MO/NuminaMath-TIR#5000", [Source("AI-MO/NuminaMath-TIR", 5000)]),
        ("openai/gsm8k:main#20, b.jsonl", [Source("openai/gsm8k:main", 20), Source("b.jsonl")]),
        ("a#b.jsonl", [Source("a#b.jsonl")]),
    ],
)
def test_sources_are_named_with_commas_and_counted_with_a_hash(text: str, sources: list[Source]) -> None:
    assert parse_sources(text) == sources


@pytest.mark.parametrize("text", ["a.jsonl,", "#5", "a.jsonl#0"])
def test_a_source_without_name_or_rows_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected sources of rows .* got .*; set data.train, data.eval or warmup"):
        parse_sources(text)


def test_a_path_that_is_there_is_one_source_whatever_its_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a, b#3"
    odd.mkdir()
    assert parse_sources(str(odd)) == [Source(str(odd))]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").touch()
    assert absolute_sources("c.jsonl#3,some/name#4") == f"{tmp_path / 'c.jsonl'}#3,some/name#4"


def test_a_recipe_may_name_sources_as_a_list() -> None:
    config = build([Value("data.train", ["a.jsonl#3", "openai/gsm8k"], "recipe.yaml:2")]).config
    assert parse_sources(config.data.train) == [Source("a.jsonl", 3), Source("openai/gsm8k")]
    assert Config.model_validate({"data": {"eval": "a.jsonl"}}).data.eval == "a.jsonl"
    with pytest.raises(ConfigError, match=r"names without a comma, got 'a,b'; rename that file or folder"):
        build([Value("data.train", ["a,b"], "recipe.yaml:2")])


def test_sources_of_different_conventions_are_read_together_and_each_is_said(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(6)])
    chat = [{"role": "user", "content": "p"}]
    row = {"prompt": chat, "reward_model": {"style": "rule", "ground_truth": "9"}}
    other = write(tmp_path / "verl.jsonl", [row])
    records, notes, _ = load(f"{plain}#4,{other}#2")
    assert [record.columns.prompt for record in records] == ["question"] * 4 + ["prompt"] * 2
    assert [record.row["prompt"] for record in records[4:]] == [chat, chat]
    assert notes == [
        f"4 of 6 rows from {plain}: prompt <- question, answer <- answer (GSM8K's columns)",
        f"2 of 1 rows from {other}: prompt <- prompt, answer <- reward_model.ground_truth (verl's columns)",
    ]


def test_what_only_later_rows_have_before_their_query_is_not_lost(tmp_path: Path) -> None:
    row = {"query": "q", "response": "#### 1"}
    source = write(tmp_path / "a.jsonl", [row, row | {"history": [["a", "b"]]}, row | {"system": "Be brief."}])
    records, _, _ = load(source)
    said = [[message["content"] for message in messages_of(*record, "", "")] for record in records]
    assert said == [["q"], ["a", "b", "q"], ["Be brief.", "q"]]


def test_a_seed_gives_the_same_rows_again_and_another_seed_others(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": f"q{n}", "answer": str(n)} for n in range(50)]) + "#9"
    assert load(source, seed=3).records == load(source, seed=3).records != load(source, seed=4).records


def test_a_bad_row_is_told_with_its_file_even_if_it_would_not_be_taken(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", [{"question": "q", "answer": "#### 1"}] * 30)
    bad = write(tmp_path / "train-1.jsonl", [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "one"}])
    with pytest.raises(ConfigError, match=f"'one' in row 1 of {bad}; mend that row"):
        load(f"{tmp_path}#1")


def test_held_out_rows_come_from_the_sources_that_have_some(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [{"question": name, "answer": "1"}])
    write(tmp_path / "b" / "test.jsonl", [{"question": "held out", "answer": "1"}])
    records, notes, _ = load(f"{tmp_path / 'a'},{tmp_path / 'b'}", evaluation=True)
    assert [record.row["question"] for record in records] == ["held out"]
    assert [note.split(":")[0] for note in notes] == [f"1 rows from {tmp_path / 'b'}"]
