"""The run's prompts: an endless, resumable stream over the training rows, and the held-out rows in their order.

Runs in the broker. Position n of the stream is a pure function of (seed, n): pass n // rows over the data, in that
pass's own permutation. So the cursor is one number, which the ledger keeps, and there is no barrier between passes.
Prompts are tokenised here once and for all, when they are asked for.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from broker.columns import columns_for_rewards, demonstrated_by, demonstration, messages_of
from broker.dataset import EVAL_SPLITS
from broker.held_out import in_turn, source_labels
from broker.records import Record, load_records
from broker.tokenizer import ChatTokenizer
from protocol.codec import can_travel
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.sources import Source, parse_sources
from protocol.types import Prompt, Tokens

log = logging.getLogger("tether.prompts")

LOOKED_AT = 64  # first rows of a source that are tokenised at the start, so that what cannot work is refused at once
CACHED_PROMPTS = 4096
MAX_COLUMNS_CHARACTERS = 256 << 10  # of a row as JSON: it travels with every lease of its prompt
TEXT_SUFFIXES = (".txt", ".md")  # a system message of one word that ends so is the name of a file
TOO_LONG, TOO_LARGE, UNSENDABLE = "prompt_too_long", "row_too_large", "row_unsendable"
REFUSED = "refused_by_chat_template"


class Unusable(NamedTuple):
    """A prompt that cannot be leased; the ledger counts it as filtered, by this reason."""

    number: int
    reason: str


class PromptSource:
    """Tokenised prompts by number. Raises ConfigError at once for data that cannot work."""

    def __init__(self, config: Config, tokenizer: ChatTokenizer) -> None:
        self._settings, self._tokenizer, self._seed = config.data, tokenizer, config.run.seed
        self._warmup_data = config.warmup.data
        self._sends_conversation = bool(config.rewards.model.path)
        self.notes: list[str] = []  # which rows the run reads, and which of their columns is what
        rewards = [function.use for function in config.rewards.functions]
        self._records = [] if config.run.evaluation_only else self._load(config.data.train, rewards, "training")
        if 0 < config.data.max_rows < len(self._records):
            self._records = self._records[: config.data.max_rows]
            self._note(f"training: the first {len(self._records)} of them, as data.max_rows says")
        self._system = _text_or_file(config.data.system)
        self._cached = lru_cache(CACHED_PROMPTS)(self._make)
        self._check_first_rows()
        self.evaluation: list[Prompt] = []
        self.evaluation_sources: list[str] = []  # of each of them
        if config.evaluates:
            self._hold_out(config)

    @property
    def num_rows(self) -> int:
        return len(self._records)

    def prompt(self, number: int) -> Prompt | Unusable:
        """Position `number` of the stream."""
        return self._cached(number)

    def decode(self, tokens: Tokens, *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def supervised(self) -> Iterator[tuple[Tokens, Tokens]]:
        """(prompt, answer) tokens of every row for the warm start that has a plain text answer and fits."""
        records = self._load(self._warmup_data, (), "warm start") if self._warmup_data else self._records
        self._note(f"warm start: imitates {demonstrated_by(*records[0])}")
        for record in records:
            answer = demonstration(*record)
            tokens = self._tokenize(record)
            if answer is not None and len(tokens) <= self._settings.max_prompt_tokens:
                yield tokens, self._tokenizer.encode_answer(answer)

    def _load(self, text: str, rewards: Sequence[str], use: str) -> list[Record]:
        sources = parse_sources(text)
        loaded = load_records(sources, self._settings, rewards, evaluation=False, seed=self._seed)
        self._note(*(f"{use}: {note}" for note in loaded.notes))
        return loaded.records

    def _note(self, *notes: str) -> None:
        self.notes += notes
        for note in notes:
            log.info("%s", note)

    def _make(self, number: int) -> Prompt | Unusable:
        row_number = self._row_at(number)
        try:
            return self._prompt(number, row_number, self._records[row_number])
        except ConfigError as error:  # of the chat template
            log.error("row %d is left out: %s", row_number, error)
            return Unusable(number, REFUSED)

    def _prompt(self, number: int, row_number: int, record: Record) -> Prompt | Unusable:
        tokens = self._tokenize(record)
        if len(tokens) > self._settings.max_prompt_tokens:
            return Unusable(number, TOO_LONG)
        seen = columns_for_rewards(*record)
        messages = self._messages(record) if self._sends_conversation else []
        conversation = json.loads(json.dumps(messages, default=str))
        if len(json.dumps([seen, conversation])) > MAX_COLUMNS_CHARACTERS:
            return Unusable(number, TOO_LARGE)
        if not can_travel([seen, conversation]):
            return Unusable(number, UNSENDABLE)
        return Prompt(number, row_number, tokens, seen, conversation)

    def _row_at(self, number: int) -> int:
        turn, place = divmod(number, self.num_rows)
        return int(_permutation(self._seed, turn, self.num_rows)[place]) if self._settings.shuffle else place

    def _tokenize(self, record: Record) -> Tokens:
        messages = self._messages(record)
        if isinstance(record.row[record.columns.prompt], str) and not self._tokenizer.has_chat_template:
            return self._tokenizer.encode("\n".join(str(message["content"]) for message in messages))
        return self._tokenizer.encode_chat(messages)

    def _messages(self, record: Record) -> list[Mapping[str, Any]]:
        return messages_of(*record, self._system, self._settings.suffix)

    def _hold_out(self, config: Config) -> None:
        """Take the first prompts of each source that fit, numbered by their place here. A training file holds none out.

        Which rows are drawn of a source does not depend on the run's seed, so that runs can be compared.
        """
        source = config.data.eval or config.data.train
        sources = parse_sources(source)
        if not config.data.eval:  # how many of the rows to train on says nothing about the others
            sources = [Source(name) for name, _ in sources if not Path(name).is_file()]
        rewards = [function.use for function in config.all_rewards.functions]
        records, notes, names = load_records(sources, self._settings, rewards, evaluation=True, seed=0)
        if config.data.eval and (without := [each.name for each in sources if each.name not in set(names)]):
            raise ConfigError(
                f"expected held-out rows in every source of data.eval, got none from {without[0]} (of a folder or a "
                f"dataset its files or split called {', '.join(EVAL_SPLITS)} count); set data.eval"
            )
        labels = source_labels([record.row for record in records], names)
        found, num_unusable = self.evaluation, 0
        for number in in_turn(labels):
            if len(found) == config.evaluation.max_prompts:
                break
            prompt = self._prompt(len(found), number, records[number])
            if isinstance(prompt, Prompt):
                found.append(prompt)
                self.evaluation_sources.append(labels[number])
            else:
                num_unusable += 1
        counts = Counter(self.evaluation_sources)
        each = f" ({', '.join(f'{count} of {label}' for label, count in counts.items())})" if len(counts) > 1 else ""
        left_out = f"; {num_unusable} longer than {self._settings.max_prompt_tokens} tokens or too large, and left out"
        self._note(*(f"held out: {note}" for note in notes))
        self._note(f"held out: {len(found)} prompts{each}{left_out if num_unusable else ''}")
        if not found:
            every, only = config.evaluation.every, config.run.evaluation_only
            why = "run.evaluation_only is set" if only else f"evaluation.every is {every}"
            instead = "" if only else ", or --evaluation.every 0"
            raise ConfigError(
                f"{why}, but there are no held-out rows that fit: {source} has no test split (a single file has none), "
                f"or none with prompts up to {config.data.max_prompt_tokens} tokens; set data.eval{instead}"
            )

    def _check_first_rows(self) -> None:
        if not self._records:
            return
        each = groupby(self._records, lambda record: id(record.columns))  # a source has its own
        lengths = [len(self._tokenize(record)) for _, records in each for record in islice(records, LOOKED_AT)]
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
    """Raises ConfigError for a text that was meant as a file's name."""
    if os.path.isfile(value):
        return Path(value).read_text(encoding="utf-8").strip()
    if value.endswith(TEXT_SUFFIXES) and not any(character.isspace() for character in value):
        raise ConfigError(f"expected a text file at {value}, there is none; set data.system to a file or to a text")
    return value
