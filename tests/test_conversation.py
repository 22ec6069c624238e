"""Turns and observations joined into one completion: marks, spans, room, and what cannot be trained."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.conversation import Conversation
from actors.fake_engine import FakeEngine
from actors.rollout import RolloutFailed
from actors.texts import Texts
from protocol.types import Completion, FinishReason, VersionSpan
from tests.models import make_tiny_qwen2
from tests.rollouts import PROMPT, VOCABULARY, Bench
from tools.tiny_model import END, Shape, train_tokenizer, write_model


def test_turns_and_observations_become_one_completion(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        talk = Conversation(bench.sample_engine(engine), PROMPT)
        first = await talk.generate(max_tokens=4)
        talk.observe([7, 8])
        second = await talk.generate(max_tokens=5)
        made = talk.completion()
        assert made.tokens.tolist() == [*first.tokens, 7, 8, *second.tokens]
        assert made.observed is not None
        assert np.flatnonzero(made.observed).tolist() == [4, 5]
        assert np.isnan(made.behavior_logprobs).tolist() == made.observed.tolist()
        assert made.spans == (VersionSpan(0, 0, 11),)
        assert made.finish_reason is FinishReason.LENGTH
        assert talk.tokens.tolist() == [*PROMPT.tokens, *made.tokens]
        assert (talk.room, talk.ended, bench.tokens) == (13, False, [4, 5])

    bench.run(work)


def test_new_weights_between_two_turns_are_in_the_spans_and_what_was_observed_counts_as_older(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        talk = Conversation(bench.sample_engine(engine), PROMPT)
        talk.observe([9])
        await talk.generate(max_tokens=4)
        await engine.load(bench.snapshot(3))
        talk.observe([7, 8])
        await talk.generate(max_tokens=4)
        assert talk.completion().spans == (VersionSpan(0, 0, 7), VersionSpan(3, 7, 11))

    bench.run(work)


def test_an_observation_that_does_not_fit_is_cut_and_then_there_is_no_further_turn(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        talk = Conversation(bench.sample_engine(engine), PROMPT)
        await talk.generate(max_tokens=20)
        talk.observe([5] * 1000)
        assert (talk.room, talk.ended) == (0, True)
        made = talk.completion()
        assert (len(made.tokens), made.finish_reason) == (24, FinishReason.LENGTH)
        with pytest.raises(RolloutFailed, match=r"there is no room for another token; look at Conversation\.ended"):
            await talk.generate()
        talk.observe([5])
        assert len(talk.completion().tokens) == 24

    bench.run(work)


def test_a_turn_ends_at_a_text_at_a_token_or_where_the_model_ends_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, mean_tokens=12.0)

    async def work(engine: FakeEngine) -> None:
        sample = bench.sample_engine(engine)
        whole = await sample.generate(PROMPT.tokens)
        at = len(whole.tokens) // 2
        text = sample.decode(whole.tokens[at : at + 2])
        stopped = Conversation(bench.sample_engine(engine), PROMPT)
        turn = await stopped.generate(stop=[text])
        assert turn.tokens.tolist() == whole.tokens[: at + 2].tolist()
        assert (turn.finish_reason, stopped.ended) == (FinishReason.STOP, False)
        between = await bench.sample_engine(engine).generate(PROMPT.tokens, stop=[" "])
        assert len(between.tokens) == 2, "a text between two tokens"
        at_token = Conversation(bench.sample_engine(engine), PROMPT)
        turn = await at_token.generate(stop_token_ids=[int(whole.tokens[at])])
        assert (len(turn.tokens), at_token.ended) == (at + 1, False)
        free = Conversation(bench.sample_engine(engine), PROMPT)
        assert (await free.generate(stop=["no such text"])).finish_reason is FinishReason.STOP
        assert free.ended
        assert free.completion().observed is None

    bench.run(work)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: replace(c, tokens=np.roll(c.tokens, 1)), "token 0 of the completion was not generated behind"),
        (lambda c: replace(c, observed=None), "token 4 of the completion was not generated behind those before it"),
        (lambda c: replace(c, observed=np.ones(11, np.bool_)), "every token is observed"),
        (lambda c: replace(c, observed=np.ones(3, np.bool_)), "observed has a mark for each of 11 tokens"),
        (lambda c: replace(c, behavior_logprobs=c.behavior_logprobs - 1), "token 0 of the completion was not"),
        (
            lambda c: replace(c, behavior_logprobs=c.behavior_logprobs[1:]),
            "spans and log-probabilities cover 11 tokens",
        ),
        (lambda c: replace(c, spans=(VersionSpan(1, 0, 11),)), "token 0 of the completion was not generated"),
        (lambda c: replace(c, spans=(VersionSpan(0, 0, 9),)), "cover 11 tokens, got 9 and 11"),
        (lambda c: replace(c, spans=()), "cover 11 tokens, got 0 and 11"),
        (lambda c: replace(c, tokens=np.full(11, VOCABULARY)), "token ids are 0 to 49, got 50"),
        (lambda c: replace(c, tokens=np.zeros(25, np.int32)), "a completion has 1 to 24 tokens"),
        (lambda c: replace(c, tokens=np.zeros(0, np.int32)), "a completion has 1 to 24 tokens"),
    ],
)
def test_a_completion_that_is_not_what_was_generated_is_told(tmp_path: Path, change: Any, reason: str) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        sample = bench.sample_engine(engine)
        talk = Conversation(sample, PROMPT)
        await talk.generate(max_tokens=4)
        talk.observe([7, 8])
        await talk.generate(max_tokens=5)
        made = talk.completion()
        sample.check(made)
        with pytest.raises(RolloutFailed, match=reason):
            sample.check(change(made))

    bench.run(work)


def test_a_turn_may_be_cut_short_and_one_of_several_tries_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        sample = bench.sample_engine(engine)
        tries = [await sample.generate(PROMPT.tokens, max_tokens=6) for _ in range(3)]
        assert len({tuple(one.tokens.tolist()) for one in tries}) == 3, "each turn has a seed of its own"
        kept = tries[1]
        spans = (VersionSpan(0, 0, 4),)
        sample.check(Completion(kept.tokens[:4], kept.behavior_logprobs[:4], spans, FinishReason.LENGTH))

    bench.run(work)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([1.5], "token ids are a list of integers, got float64"),
        (["a"], "token ids are a list of integers"),
        ([[1, 2]], "token ids are a list of integers"),
        ([-1], "token ids are 0 to 49, got -1"),
        ([1 << 70], "token ids are a list of integers, got object"),
    ],
)
def test_what_are_no_token_ids_is_told_before_anything_is_sent(tmp_path: Path, tokens: Any, reason: str) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        sample = bench.sample_engine(engine)
        with pytest.raises(RolloutFailed, match=reason):
            Conversation(sample, PROMPT).observe(tokens)
        with pytest.raises(RolloutFailed, match=reason):
            await sample.generate(tokens)

    bench.run(work)


def test_a_text_in_the_place_of_a_list_of_texts_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        with pytest.raises(RolloutFailed, match="stop is a list of texts that are not empty, got '='"):
            await bench.sample_engine(engine).generate(PROMPT.tokens, stop="=")

    bench.run(work)


def test_a_conversation_in_which_the_model_said_nothing_is_no_completion(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        talk = Conversation(bench.sample_engine(engine), PROMPT)
        talk.observe([4])
        with pytest.raises(RolloutFailed, match="the model has written nothing"):
            talk.completion()

    bench.run(work)


def test_chat_messages_stand_between_turns_as_the_template_puts_them(tmp_path: Path) -> None:
    """Behind a turn that the model ended, and behind one that was cut."""
    texts = ["Is it seven? No. Are you sure? Yes."]
    write_model(tmp_path / "chat", train_tokenizer(texts, 300), Shape(hidden=8, layers=1, heads=2, intermediate=8), 0)
    bench = Bench(tmp_path, mean_tokens=3.0)

    async def work(engine: FakeEngine) -> None:
        sample = bench.sample_engine(engine)
        sample._texts = Texts(tmp_path / "chat")
        end = int(sample.encode(END)[0])
        engine._stop_token_ids = lambda: frozenset({0, end})  # type: ignore[method-assign]
        for is_ended in (True, False):
            talk = Conversation(sample, PROMPT)
            await talk.generate(stop_token_ids=() if is_ended else range(VOCABULARY))
            last = talk._parts[-1]
            talk._parts[-1] = replace(last, tokens=np.append(last.tokens[:-1], np.int32(end if is_ended else 9)))
            before = talk.tokens.tolist()
            await talk.reply([{"role": "user", "content": "Are you sure?"}])
            told = talk.tokens.tolist()[len(before) :]
            wanted = "<|user|>Are you sure?<|assistant|>"
            assert sample.decode(told, special=True) == (wanted if is_ended else END + wanted)
            assert not talk.ended

    bench.run(work)


def test_a_model_without_a_chat_template_is_told_when_messages_are_wanted(tmp_path: Path) -> None:
    make_tiny_qwen2(tmp_path / "plain", tied=True)
    with pytest.raises(RolloutFailed, match="the model has no chat template; observe tokens of your own"):
        asyncio.run(Texts(tmp_path / "plain").between_turns([{"role": "user", "content": "w3"}]))
