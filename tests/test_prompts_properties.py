"""The prompt stream under every interruption, and with rows that JSON can hold and the wire cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.ledger import Ledger
from broker.prompts import UNSENDABLE, PromptSource, Unusable
from broker.tokenizer import ChatTokenizer
from protocol.codec import Header, decode, encode
from protocol.config import Config
from protocol.messages import LeaseItem, Leases
from protocol.types import Prompt
from tests.message_values import same
from tools.tiny_model import Shape, train_tokenizer, write_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, train_tokenizer(["What is 1 + 1?"], 300), Shape(hidden=32, heads=2, intermediate=32), seed=0)
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def source_of(
    folder: Path, tokenizer: ChatTokenizer, rows: list[dict[str, Any]], seed: int, shuffle: bool, taken: int
) -> PromptSource:
    """Over so many of the rows."""
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data": {"train": f"{file}#{taken}", "shuffle": shuffle}, "rewards": {"functions": [{"use": "r.py:r"}]}}
    more = {"run": {"seed": seed}, "evaluation": {"every": 0}}
    return PromptSource(Config.model_validate(settings | more), tokenizer)


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 7),
    taken=st.integers(1, 11),
    seed=st.integers(0, 1 << 40),
    shuffle=st.booleans(),
    lives=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_a_stream_that_is_resumed_anywhere_is_the_stream_that_was_never_interrupted(
    folder: Path,
    tokenizer: ChatTokenizer,
    num_rows: int,
    taken: int,
    seed: int,
    shuffle: bool,
    lives: list[tuple[int, int]],
) -> None:
    """Each life trains so many prompts and then offers so many more that its death takes back."""
    rows = [{"question": f"What is {n} + 1?"} for n in range(num_rows)]
    checkpoint = Ledger().snapshot()
    trained: list[tuple[int, int]] = []
    for num_trained, num_lost in lives:
        ledger, source = Ledger.restore(checkpoint), source_of(folder, tokenizer, rows, seed, shuffle, taken)
        for place in range(num_trained + num_lost):
            number = ledger.queue[0] if ledger.queue else ledger.offered
            if ledger.queue:
                ledger.lease_again(number)
            else:
                assert ledger.offer() == number
            prompt = source.prompt(number)
            assert isinstance(prompt, Prompt)
            if place < num_trained:
                ledger.train([number])
                trained.append((number, prompt.row))
                checkpoint = ledger.snapshot()
    whole = source_of(folder, tokenizer, rows, seed, shuffle, taken)
    uninterrupted = [whole.prompt(number) for number in range(len(trained))]
    assert trained == [(prompt.number, prompt.row) for prompt in uninterrupted if isinstance(prompt, Prompt)]
    for start in range(0, len(trained) - taken + 1, taken):
        in_this_pass = [row for _, row in trained[start : start + taken]]
        assert sorted(in_this_pass) == list(range(taken))
        assert shuffle or in_this_pass == list(range(taken))


ODD_TEXT = st.text(st.sampled_from("a1é \U0001f600\u2028\ud800\udfff"), max_size=5)
NUMBERS = st.integers(-(1 << 66), 1 << 66) | st.floats()
LONG = st.just([0] * 20_000) | st.just({str(n): 0 for n in range(5000)})
ODD_JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | ODD_TEXT | LONG,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=5,
)


def fits(value: Any) -> bool:
    """In words: Unicode, whole numbers of 64 bits, lists and maps that are not endless."""
    if isinstance(value, str):
        return not any(0xD800 <= ord(character) < 0xE000 for character in value)
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 64
    if isinstance(value, dict):
        return len(value) <= 4096 and all(fits(key) and fits(inner) for key, inner in value.items())
    return not isinstance(value, list) or (len(value) <= 16384 and all(map(fits, value)))


@settings(max_examples=80)
@given(question=ODD_TEXT.filter(str.strip), extra=ODD_JSON)
def test_a_row_reaches_the_generator_as_it_is_or_is_said_to_be_unusable(
    folder: Path, tokenizer: ChatTokenizer, question: str, extra: Any
) -> None:
    """One odd row in a dataset stops no run."""
    question, extra = json.loads(json.dumps([question, extra]))  # which joins two halves of a surrogate pair
    rows = [{"question": "What is 1 + 1?"}, {"question": question, "extra": extra}]
    prompt = source_of(folder, tokenizer, rows, seed=0, shuffle=False, taken=2).prompt(1)
    if not fits([question, extra]):
        assert prompt == Unusable(1, UNSENDABLE)
        return
    assert isinstance(prompt, Prompt)
    columns = dict(prompt.columns)
    assert same(columns["extra"], extra)
    item = LeaseItem(
        kind="train", number=1, row=1, attempt=1, samples=1, version=0, failures=0, ttl_s=1.0, num_tokens=0,
        columns=columns,
    )  # fmt: skip
    leases = Leases(leases=[item], tokens=np.zeros(0, np.int32))
    back = decode([bytes(frame) for frame in encode(leases, Header(1, 1, 1))]).message
    assert isinstance(back, Leases)
    assert same(back.leases[0].columns, columns)
