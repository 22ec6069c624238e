"""Rows that cannot work, told by file, row and column before the run begins.

Runs in the broker; pure. That bad data never reaches training in silence rests on `check_rows`, which looks at every
row of every source. Rows are counted from 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from broker.columns import Columns, names, reads_number, reference
from broker.dataset import Row, Table
from protocol.errors import ConfigError

ID_COLUMN = "id"
_MARKED = re.compile(r"#### -?[.,]*[0-9]")
_NUMBER = re.compile(r"\s*-?[.,]*[0-9][0-9.,]*\s*")


def check_rows(tables: Sequence[Table], columns: Columns, rewards: Iterable[str]) -> None:
    """Raises ConfigError naming the first row that lacks what the run will read, or repeats another row's id.

    `rewards`: their names, because some read the answer in a form of their own.
    """
    needs_number = reads_number(rewards)
    first = tables[0].rows[0].get(columns.prompt) if tables else None
    ids: dict[str, str] = {}
    for table in tables:
        for number, row in enumerate(table.rows):
            place = f"row {number} of {table.place}"
            _check_prompt(row, columns, type(first), place)
            _check_answer(row, columns, needs_number, place)
            _check_turns_before(row, columns, place)
            if row.get(ID_COLUMN) is not None:
                before = ids.setdefault(repr(row[ID_COLUMN]), place)
                if before != place:
                    raise ConfigError(
                        f"expected another {ID_COLUMN} in every row, {before} and {place} both have "
                        f"{row[ID_COLUMN]!r}; remove one of them, or give the column {ID_COLUMN} another name"
                    )


def _check_prompt(row: Row, columns: Columns, kind: type, place: str) -> None:
    prompt = row.get(columns.prompt)
    if not (prompt.strip() if isinstance(prompt, str) else _are_messages(prompt)):
        seen = repr(prompt)[:60] if columns.prompt in row else f"only the columns {names(row)}"
        raise ConfigError(
            f"expected text or chat messages in column {columns.prompt} of every row, {place} has {seen}; remove that "
            "row, or set data.prompt_column"
        )
    if not isinstance(prompt, kind):
        raise ConfigError(
            f"expected all rows of a source alike, column {columns.prompt} has {_kind(prompt)} in {place} and "
            f"{'text' if kind is str else 'chat messages'} in the first row; write both in one form, or name them as "
            "two sources"
        )


def _check_answer(row: Row, columns: Columns, needs_number: str, place: str) -> None:
    if columns.answer and columns.answer not in row:
        raise ConfigError(
            f"expected all rows of a source alike, with the answer in column {columns.answer}, {place} has only the "
            f"columns {names(row)}; add it, name the rows as two sources, or set data.answer_column"
        )
    answer = reference(row, columns)
    has_number = _is_number(answer) or (
        isinstance(answer, str) and (_MARKED.search(answer) or _NUMBER.fullmatch(answer))
    )
    if needs_number and columns.answer and not has_number:
        raise ConfigError(
            f'the reward {needs_number} reads a number after "#### ", or a text that is nothing else, column '
            f"{columns.answer} has {repr(answer)[-60:]} in {place}; mend that row, set data.answer_column, or take "
            "another reward with --reward"
        )


def _check_turns_before(row: Row, columns: Columns, place: str) -> None:
    system, turns = row.get(columns.system), row.get(columns.history) or []
    if not isinstance(system, str | None):
        raise ConfigError(
            f"expected a text in column {columns.system}, {place} has {repr(system)[:60]}; mend that row, or give the "
            "column another name"
        )
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise ConfigError(
            f"expected column {columns.history} to be a list of [question, answer] texts, {place} has "
            f"{repr(turns)[:60]}; mend that row, or give the column another name"
        )


def _are_messages(value: Any) -> bool:
    """Chat messages with something to answer."""
    if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
        return False
    asked = value[:-1] if value[-1]["role"] == "assistant" else value
    return bool(asked and asked[-1].get("content") and value[0]["role"] != "assistant")


def _is_message(value: Any) -> bool:
    """A role with a text, a list of parts, or calls of tools."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def _is_turn(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(prompt: Any) -> str:
    return "text" if isinstance(prompt, str) else "chat messages"
