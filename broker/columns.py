"""Which column of a row is what: the prompt, the reference answer, the system message.

Runs in the broker; pure. Four conventions are recognised by their column names: GSM8K's (question, answer), verl's
(prompt, reward_model), TRL's (prompt and anything else) and ms-swift's (messages, or query with response or solution,
system and history); settings override them, and may name a field inside a column as COLUMN.FIELD. Rewards see every
column of a row. Rows that lack what a column should have are told by `broker/row_checks.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from broker.dataset import Row, Table
from protocol.errors import ConfigError
from protocol.sections import DataConfig

PROMPT_COLUMNS = ("prompt", "messages", "question", "query", "problem", "instruction")
ANSWER_COLUMNS = ("answer", "solution", "reward_model", "ground_truth", "response", "target", "completion")
SWIFT = "ms-swift's columns"
BEFORE_QUERY = ("system", "history")  # of ms-swift's rows; each has what it needs of them
NUMBER_REWARDS = ("gsm8k", "gsm8k_flexible")  # rewards that compare with the number after ####


class Columns(NamedTuple):
    """Which column holds the prompt, which the reference answer, the system message and the turns before the prompt.

    "" stands for none.
    """

    prompt: str
    answer: str
    system: str = ""
    convention: str = ""  # whose names they are
    history: str = ""  # pairs of texts: what the user said, what was answered

    def __str__(self) -> str:
        answer = "reward_model.ground_truth" if self.answer == "reward_model" else self.answer or "none"
        system = f", system <- {self.system}" if self.system else ""
        history = f", turns before it <- {self.history}" if self.history else ""
        return f"prompt <- {self.prompt}, answer <- {answer}{system}{history} ({self.convention})"


def recognise(row: Row, settings: DataConfig, rewards: Iterable[str] = ()) -> Columns:
    """Which columns of rows like this one are what.

    Raises ConfigError naming the columns that are there, if one is missing that is set or that a reward reads.
    """
    prompt = settings.prompt_column or next((name for name in PROMPT_COLUMNS if name in row), "")
    answer = settings.answer_column or next((name for name in ANSWER_COLUMNS if name in row), "")
    if _is_verl(row) and not settings.answer_column:
        answer = "reward_model"
    if prompt not in row:
        wanted = prompt or f"one of {', '.join(PROMPT_COLUMNS)}"
        raise ConfigError(f"expected a prompt column ({wanted}), the rows have {names(row)}; set data.prompt_column")
    if settings.answer_column and answer not in row:
        raise ConfigError(f"expected an answer column {answer}, the rows have {names(row)}; set data.answer_column")
    if not answer and (reward := reads_number(rewards)):
        raise ConfigError(
            f"expected a column with the answer that the reward {reward} reads (one of {', '.join(ANSWER_COLUMNS)}), "
            f"the rows have {names(row)}; set data.answer_column, or take another reward with --reward"
        )
    system, history = (name if prompt == "query" and name in row else "" for name in BEFORE_QUERY)
    return Columns(prompt, answer, system, _convention(row, prompt, answer, settings), history)


def with_fields(table: Table, settings: DataConfig) -> Table:
    """The same rows, those fields that settings name as COLUMN.FIELD as columns of that name."""
    wanted = [name for name in (settings.prompt_column, settings.answer_column) if "." in name]
    return Table(table.place, [row | _fields(row, wanted) for row in table.rows]) if wanted else table


def columns_for_rewards(row: Row, columns: Columns) -> Row:
    """Every column as plain JSON, with the question as `prompt` and the reference as `answer`, of verl's rows also as
    `ground_truth`, in the place of what the row has under these names.
    """
    seen = row | {"prompt": row[columns.prompt]}
    answer = reference(row, columns)
    if answer is not row.get(columns.answer):
        seen["ground_truth"] = answer
    if answer is not None:
        seen["answer"] = answer
    return dict(json.loads(json.dumps(seen, default=str)))  # parquet has dates, the Hub has images


def messages_of(row: Row, columns: Columns, system: str, suffix: str) -> list[Mapping[str, Any]]:
    """The conversation up to where the model answers. A row's own system message goes before the run's."""
    prompt = row[columns.prompt]
    if isinstance(prompt, str):
        messages: list[Mapping[str, Any]] = []
        for asked, answered in row.get(columns.history) or ():
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": prompt + suffix})
    else:
        messages = list(prompt[:-1]) if prompt[-1]["role"] == "assistant" else list(prompt)
    system = row.get(columns.system) or system
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def demonstration(row: Row, columns: Columns) -> str | None:
    """What a warm start imitates; None if it is no text.

    The chat's last answer, verl's worked answer, ms-swift's response, else the reference.
    """
    answer = _imitated(row, columns)[1]
    return answer if isinstance(answer, str) else None


def demonstrated_by(row: Row, columns: Columns) -> str:
    """Where a row's demonstration stands, in words."""
    return _imitated(row, columns)[0]


def _imitated(row: Row, columns: Columns) -> tuple[str, Any]:
    prompt, details = row[columns.prompt], row.get("extra_info")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        return f"the last message of {columns.prompt}", prompt[-1].get("content")
    if columns.answer == "reward_model" and isinstance(details, dict):
        return "extra_info.answer", details.get("answer")
    if columns.convention == SWIFT and "response" in row:
        return "response", row["response"]
    return columns.answer or "no column", row.get(columns.answer)


def reads_number(rewards: Iterable[str]) -> str:
    """The first reward that compares with a number; "" if there is none."""
    return next((name for name in rewards if name in NUMBER_REWARDS), "")


def _fields(row: Row, names: Iterable[str]) -> Row:
    """Those of the names COLUMN.FIELD that the row has."""
    found: Row = {}
    for name in names:
        column, _, inside = name.partition(".")
        if name not in row and isinstance(row.get(column), dict) and inside in row[column]:
            found[name] = row[column][inside]
    return found


def reference(row: Row, columns: Columns) -> Any:
    """The answer, of verl's reward_model its ground truth; None if the row has none."""
    answer = row.get(columns.answer)
    return answer["ground_truth"] if isinstance(answer, dict) and "ground_truth" in answer else answer


def _convention(row: Row, prompt: str, answer: str, settings: DataConfig) -> str:
    if settings.prompt_column or settings.answer_column:
        return "as set"
    if _is_verl(row) and prompt == "prompt":
        return "verl's columns"
    if (prompt, answer) == ("question", "answer"):
        return "GSM8K's columns"
    named = {"prompt": "TRL's columns", "messages": SWIFT, "query": SWIFT}
    return named.get(prompt, "by name")


def _is_verl(row: Row) -> bool:
    return isinstance(row.get("reward_model"), dict) and "ground_truth" in row["reward_model"]


def names(row: Row) -> str:
    return ", ".join(row)
