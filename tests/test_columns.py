"""Which column of a row is what, and how rows that lack them are told."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from broker.columns import (
    Columns,
    columns_for_rewards,
    demonstrated_by,
    demonstration,
    messages_of,
    recognise,
    with_fields,
)
from broker.dataset import Row, Table
from broker.row_checks import check_rows
from protocol.errors import ConfigError
from protocol.sections import DataConfig

GSM8K = {"question": "What is 1 + 1?", "answer": "1+1=2\n#### 2"}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 71 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 3, "answer": "71+1=72\n#### 72"},
}
CHAT = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "shown"}]
QA = Columns("question", "answer")


def check(rows: list[Row], columns: Columns = QA, rewards: tuple[str, ...] = ()) -> None:
    check_rows([Table("rows", rows)], columns, rewards)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GSM8K, "prompt <- question, answer <- answer (GSM8K's columns)"),
        (VERL, "prompt <- prompt, answer <- reward_model.ground_truth (verl's columns)"),
        (VERL | {"answer": "a"}, "prompt <- prompt, answer <- reward_model.ground_truth (verl's columns)"),
        ({"prompt": "p", "difficulty": 3}, "prompt <- prompt, answer <- none (TRL's columns)"),
        ({"messages": CHAT, "solution": "s"}, "prompt <- messages, answer <- solution (ms-swift's columns)"),
        ({"query": "q", "response": "r"}, "prompt <- query, answer <- response (ms-swift's columns)"),
        (
            {"system": "b", "query": "q", "solution": "s"},
            "prompt <- query, answer <- solution, system <- system (ms-swift's columns)",
        ),
        (
            {"query": "q", "response": "r", "history": [], "rejected_response": "x"},
            "prompt <- query, answer <- response, turns before it <- history (ms-swift's columns)",
        ),
        ({"problem": "p", "solution": "s"}, "prompt <- problem, answer <- solution (by name)"),
    ],
)
def test_conventions_are_recognised_by_their_columns_and_said(row: Row, said: str) -> None:
    assert str(recognise(row, DataConfig())) == said


SWIFT = {"system": "Be brief.", "query": "And 3?", "response": "4", "rejected_response": "5", "solution": "#### 4"}


def test_ms_swifts_history_comes_before_its_query() -> None:
    row = SWIFT | {"history": [["What is 1 + 1?", "2"], ["And 2?", "3"]]}
    columns = recognise(row, DataConfig())
    check([row, SWIFT | {"history": None}, SWIFT | {"history": []}], columns)
    assert messages_of(row, columns, "of the run", " Think.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And 3? Think."},
    ]
    assert messages_of(SWIFT, columns, "", "")[1:] == [{"role": "user", "content": "And 3?"}]
    assert columns_for_rewards(row, columns)["answer"] == "#### 4"
    assert demonstration(row, columns) == "4"


def test_a_system_message_that_is_no_text_is_told() -> None:
    with pytest.raises(ConfigError, match=r"expected a text in column system, row 1 of rows has 7; mend that row"):
        check([SWIFT, SWIFT | {"system": 7}], recognise(SWIFT, DataConfig()))


@pytest.mark.parametrize("history", ["once", [["only asked"]], [["a", 1]], [{"role": "user", "content": "a"}]])
def test_a_history_that_is_none_is_told(history: Any) -> None:
    columns = recognise(SWIFT | {"history": []}, DataConfig())
    with pytest.raises(ConfigError, match=r"column history to be a list of \[question, answer\] texts, row 0 of rows"):
        check([SWIFT | {"history": history}], columns)


def test_a_field_inside_a_column_may_be_named() -> None:
    settings = DataConfig(prompt_column="extra_info.question", answer_column="extra_info.answer")
    row = VERL | {"extra_info": {"question": "What is 71 + 1?", "answer": "71+1=72\n#### 72"}}
    table = with_fields(Table("rows", [row, VERL]), settings)
    columns = recognise(table.rows[0], settings)
    assert messages_of(table.rows[0], columns, "", "") == [{"role": "user", "content": "What is 71 + 1?"}]
    assert demonstration(table.rows[0], columns) == "71+1=72\n#### 72"
    with pytest.raises(
        ConfigError, match=r"in column extra_info\.question of every row, row 1 of rows has only the col"
    ):
        check_rows([table], columns, ())
    unnamed = Table("rows", [row])
    assert with_fields(unnamed, DataConfig(prompt_column="prompt")) is unnamed


def test_a_setting_overrides_what_is_recognised() -> None:
    row = {"question": "a", "answer": "b", "task": "c", "gold": "d"}
    columns = recognise(row, DataConfig(prompt_column="task", answer_column="gold"))
    assert str(columns) == "prompt <- task, answer <- gold (as set)"
    assert recognise(VERL | {"gold": "d"}, DataConfig(answer_column="gold")).answer == "gold"


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


def test_a_reward_that_reads_an_answer_wants_a_column_for_it() -> None:
    with pytest.raises(
        ConfigError, match=r"answer that the reward gsm8k reads \(one of answer, .* have prompt; set data"
    ):
        recognise({"prompt": "p"}, DataConfig(), ("mine.py:score", "gsm8k"))


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"answer": "b"}, "only the columns answer"),
        ({"question": None, "answer": "b"}, "None"),
        ({"question": "", "answer": "b"}, "''"),
        ({"question": 12, "answer": "b"}, "12"),
        ({"question": ["a"], "answer": "b"}, r"\['a'\]"),
        ({"question": "  ", "answer": "b"}, "'  '"),
        ({"question": CHAT[1:], "answer": "b"}, "assistant"),
        ({"question": [{"role": "user"}], "answer": "b"}, "user"),
        ({"question": [{"role": "user", "content": None}], "answer": "b"}, "None"),
        ({"question": [{"role": "user", "content": 5}], "answer": "b"}, "5"),
        ({"question": [{"role": "user", "content": ""}, CHAT[1]], "answer": "b"}, "''"),
    ],
)
def test_a_row_without_a_prompt_is_named_before_the_run(row: Row, seen: str) -> None:
    with pytest.raises(ConfigError, match=f"column question of every row, row 1 of rows has .*{seen}"):
        check([GSM8K, row])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (VERL, "in column question of every row, row 1 of rows has only the columns data_source, prompt"),
        ({"question": "q"}, "in column answer, row 1 of rows has only the columns question; add it, name the rows as"),
        ({"question": CHAT[:1], "answer": "b"}, "question has chat messages in row 1 of rows and text in the first"),
    ],
)
def test_rows_of_another_schema_in_one_source_are_told(row: Row, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check([GSM8K, row])


def test_an_answer_may_be_null_where_no_reward_reads_a_number() -> None:
    check([GSM8K, GSM8K | {"answer": None}], rewards=("mine.py:score",))


@pytest.mark.parametrize("reward", ["gsm8k", "gsm8k_flexible"])
@pytest.mark.parametrize("answer", ["1+1=2", "", None, True, float("nan"), "####2", "two #### two", "#### .", "."])
def test_an_answer_without_a_number_is_told_where_a_gsm8k_reward_reads_it(answer: Any, reward: str) -> None:
    said = f"the reward {reward} reads a number after .*, column answer has .* in row 1 of rows; mend that row"
    with pytest.raises(ConfigError, match=said):
        check([GSM8K, GSM8K | {"answer": answer}], rewards=("mine.py:score", reward))


@pytest.mark.parametrize("answer", ["#### 2", "so #### -1,080.5 it is", "2", " -1,080 ", 2, 0.5])
def test_a_number_after_the_mark_or_alone_is_an_answer(answer: str) -> None:
    check([GSM8K | {"answer": answer}], rewards=("gsm8k",))


def test_the_ground_truth_of_verl_is_checked_as_the_answer() -> None:
    columns = recognise(VERL, DataConfig())
    check([VERL], columns, ("gsm8k",))
    with pytest.raises(ConfigError, match=r"column reward_model has 'x' in row 1 of rows"):
        check([VERL, VERL | {"reward_model": {"style": "rule", "ground_truth": "x"}}], columns, ("gsm8k",))


def test_an_id_that_comes_twice_is_told_with_both_rows() -> None:
    tables = [Table("a.jsonl", [GSM8K | {"id": 1}, GSM8K | {"id": None}]), Table("b.jsonl", [GSM8K, GSM8K | {"id": 1}])]
    with pytest.raises(ConfigError, match=r"row 0 of a.jsonl and row 1 of b.jsonl both have 1; remove one"):
        check_rows(tables, QA, ())
    check([GSM8K | {"id": name} for name in (1, "1", 2, None, None)])


def test_rewards_see_every_column_and_the_prompt_by_that_name() -> None:
    row = GSM8K | {"level": 2}
    assert columns_for_rewards(row, QA) == {**row, "prompt": row["question"]}


def test_the_ground_truth_of_verl_is_also_the_answer() -> None:
    seen = columns_for_rewards(VERL, Columns("prompt", "reward_model"))
    assert seen["answer"] == seen["ground_truth"] == "72"
    assert seen["reward_model"] == VERL["reward_model"]
    assert (seen["data_source"], seen["extra_info"]) == ("openai/gsm8k", VERL["extra_info"])


def test_rewards_see_the_prompt_and_the_reference_that_the_settings_name() -> None:
    row = {"prompt": "other", "answer": "other", "task": "asked", "gold": "wanted"}
    seen = columns_for_rewards(row, Columns("task", "gold"))
    assert seen == {"prompt": "asked", "answer": "wanted", "task": "asked", "gold": "wanted"}
    verl = VERL | {"answer": "other", "ground_truth": "other"}
    seen = columns_for_rewards(verl, recognise(verl, DataConfig()))
    assert seen["answer"] == seen["ground_truth"] == "72"


def test_what_json_cannot_say_reaches_rewards_as_text() -> None:
    day = datetime.date(2024, 2, 29)
    assert columns_for_rewards({"question": "a", "day": day}, Columns("question", ""))["day"] == "2024-02-29"


def test_a_rows_own_system_message_goes_before_the_runs() -> None:
    own = [{"role": "system", "content": "own"}, *CHAT[:1]]
    query = Columns("query", "", "system")
    assert messages_of({"query": "p", "system": "own"}, query, "run's", "!")[0]["content"] == "own"
    assert messages_of({"query": "p", "system": None}, query, "run's", "!") == [
        {"role": "system", "content": "run's"},
        {"role": "user", "content": "p!"},
    ]
    assert messages_of({"messages": own}, Columns("messages", ""), "run's", "!") == own


def test_a_chat_is_answered_where_its_last_answer_stands_which_a_warm_start_imitates() -> None:
    columns = Columns("messages", "solution")
    row = {"messages": CHAT, "solution": "s"}
    assert messages_of(row, columns, "", "") == CHAT[:1]
    assert demonstration(row, columns) == "shown"
    assert demonstrated_by(row, columns) == "the last message of messages"
    assert demonstration(row | {"messages": CHAT[:1]}, columns) == "s"


def test_a_warm_start_imitates_the_worked_answer_of_verls_rows() -> None:
    assert demonstration(VERL, Columns("prompt", "reward_model")) == "71+1=72\n#### 72"
    assert demonstrated_by(VERL, Columns("prompt", "reward_model")) == "extra_info.answer"
    assert demonstration(VERL | {"extra_info": {}}, Columns("prompt", "reward_model")) is None
