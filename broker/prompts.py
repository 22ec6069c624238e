"""The run's prompts: an endless, resumable stream over the training rows, and the held-out rows in their order.

Runs in the broker. Position n of the stream is a pure function of (seed, n): pass n // rows over the data, in that
pass's own permutation. So the cursor is one number, which the ledger keeps, and there is no barrier between passes.
Prompts are tokenised here once and for all, when they are asked for.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from broker.dataset import Columns, Row, check_prompts, columns_for_rewards, load_rows, recognise
from broker.tokenizer import ChatTokenizer
from protocol.codec import can_travel
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.types import Prompt, Tokens

log = logging.getLogger("tether.prompts")

LOOKED_AT = 64  # first rows that are tokenised at the start, so that a dataset that cannot work is refused at once
CACHED_PROMPTS = 4096
MAX_COLUMNS_CHARACTERS = 256 << 10  # of a row as JSON: it travels with every lease of its prompt
TOO_LONG, TOO_LARGE, UNSENDABLE = "prompt_too_long", "row_too_large", "row_unsendable"


class Unusable(NamedTuple):
    """A prompt that cannot be leased; the ledger counts it as filtered, by this reason."""

    number: int
    reason: str


class PromptSource:
    """Tokenised prompts by number. Raises ConfigError at once for data that cannot work."""

    def __init__(self, config: Config, tokenizer: ChatTokenizer) -> None:
        self._settings, self._tokenizer, self._seed = config.data, tokenizer, config.run.seed
        self._warmup_data = config.warmup.data
        rows = load_rows(config.data.train, evaluation=False)
        self._rows = rows[: config.data.max_rows] if config.data.max_rows else rows
        self._columns = recognise(self._rows[0], config.data)
        check_prompts(self._rows, self._columns, config.data.train)
        self._system = _text_or_file(config.data.system)
        self._cached = lru_cache(CACHED_PROMPTS)(self._make)
        self._check_first_rows()
        self.evaluation = self._held_out(config) if config.evaluation.every else []
        log.info(
            "%d rows from %s: prompt <- %s, answer <- %s; %d held-out prompts",
            len(self._rows),
            config.data.train,
            self._columns.prompt,
            self._columns.answer or "none",
            len(self.evaluation),
        )

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def prompt(self, number: int) -> Prompt | Unusable:
        """Position `number` of the stream."""
        return self._cached(number)

    def decode(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens)

    def supervised(self) -> Iterator[tuple[Tokens, Tokens]]:
        """(prompt, answer) tokens of every row for the warm start that has a plain text answer and fits."""
        rows = load_rows(self._warmup_data, evaluation=False) if self._warmup_data else self._rows
        columns = recognise(rows[0], self._settings) if self._warmup_data else self._columns
        check_prompts(rows, columns, self._warmup_data or self._settings.train)
        for row in rows:
            answer = row.get(columns.answer)
            tokens = self._tokenize(row, columns)
            if isinstance(answer, str) and len(tokens) <= self._settings.max_prompt_tokens:
                yield tokens, self._tokenizer.encode_answer(answer)

    def _make(self, number: int) -> Prompt | Unusable:
        row_number = self._row_at(number)
        return self._prompt(number, row_number, self._rows[row_number], self._columns)

    def _prompt(self, number: int, row_number: int, row: Row, columns: Columns) -> Prompt | Unusable:
        tokens = self._tokenize(row, columns)
        if len(tokens) > self._settings.max_prompt_tokens:
            return Unusable(number, TOO_LONG)
        seen = columns_for_rewards(row, columns)
        if len(json.dumps(seen)) > MAX_COLUMNS_CHARACTERS:
            return Unusable(number, TOO_LARGE)
        if not can_travel(seen):
            return Unusable(number, UNSENDABLE)
        return Prompt(number, row_number, tokens, seen)

    def _row_at(self, number: int) -> int:
        turn, place = divmod(number, len(self._rows))
        return int(_permutation(self._seed, turn, len(self._rows))[place]) if self._settings.shuffle else place

    def _tokenize(self, row: Row, columns: Columns) -> Tokens:
        prompt = row[columns.prompt]
        if isinstance(prompt, str):
            text = prompt + self._settings.suffix
            if not self._tokenizer.has_chat_template:
                return self._tokenizer.encode(f"{self._system}\n{text}" if self._system else text)
            messages: list[Mapping[str, Any]] = [{"role": "user", "content": text}]
        else:
            messages = list(prompt[:-1]) if prompt[-1].get("role") == "assistant" else list(prompt)
        if self._system and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return self._tokenizer.encode_chat(messages)

    def _held_out(self, config: Config) -> list[Prompt]:
        """The first prompts that fit, numbered by their place here. A single training file holds nothing out."""
        source = config.data.eval or config.data.train
        held_out = config.data.eval or not Path(source).is_file()
        rows = load_rows(source, evaluation=True) if held_out else []
        columns = recognise(rows[0], config.data) if rows else self._columns
        check_prompts(rows, columns, source)
        found: list[Prompt] = []
        for number, row in enumerate(rows):
            prompt = self._prompt(len(found), number, row, columns)
            if isinstance(prompt, Prompt):
                found.append(prompt)
            if len(found) == config.evaluation.max_prompts:
                break
        if not found:
            raise ConfigError(
                f"evaluation.every is {config.evaluation.every}, but there are no held-out rows that fit: "
                f"{source} has no test split (a single file has none), or none with prompts up to "
                f"{config.data.max_prompt_tokens} tokens; set data.eval, or --evaluation.every 0"
            )
        return found

    def _check_first_rows(self) -> None:
        lengths = [len(self._tokenize(row, self._columns)) for row in self._rows[:LOOKED_AT]]
        if min(lengths) > self._settings.max_prompt_tokens:
            raise ConfigError(
                f"the first {len(lengths)} prompts have {min(lengths)} to {max(lengths)} tokens, "
                f"data.max_prompt_tokens is {self._settings.max_prompt_tokens}: nothing would be trained; raise "
                "data.max_prompt_tokens"
            )


@lru_cache(4)
def _permutation(seed: int, turn: int, size: int) -> np.ndarray:
    """Order of one pass over the rows."""
    return np.random.Generator(np.random.PCG64([seed, turn])).permutation(size)


def _text_or_file(value: str) -> str:
    return Path(value).read_text(encoding="utf-8").strip() if os.path.isfile(value) else value
