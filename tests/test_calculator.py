"""The calculator between the model's words, by an engine that writes what a test says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.engine import EngineOptions
from actors.fake_engine import FakeEngine
from actors.rollout import Attempt, Episode
from actors.rollouts.runner import RolloutRunner
from actors.stepped_engine import Draw, Running
from protocol.config import Config
from protocol.types import FinishReason, SamplingParams
from tests.rollouts import LEASE, Bench
from tools.tiny_model import END, SPECIAL_TOKENS, Shape, train_tokenizer, write_model

WORDS = ["<<407+125=532>>532, so it is 12.5.\n#### 532", "no sum at all = 3"]


class Writer(FakeEngine):
    """Writes `script` token by token, as far as what the tool said is a part of it, and then the end of sequence."""

    script: tuple[int, ...] = ()
    prompt_tokens = 0

    async def _step(self, requests: Sequence[Running]) -> list[Draw]:
        return [self._write(request) for request in requests]

    def _write(self, request: Running) -> Draw:
        place = len(request.prompt) - self.prompt_tokens + len(request.draws)
        end = SPECIAL_TOKENS.index(END)
        return Draw(self.script[place] if place < len(self.script) else end, -0.5)

    def _stop_token_ids(self) -> frozenset[int]:
        return frozenset({SPECIAL_TOKENS.index(END)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer") / "model"
    write_model(folder, train_tokenizer(WORDS, 400), Shape(hidden=8, layers=1, heads=2, intermediate=8), 0)
    return folder


def answered(model: Path, folder: Path, script: str, max_tokens: int = 60) -> tuple[Episode, str, str]:
    """What came of it, its text, and the part of that which was observed, with | between tokens."""
    bench = Bench(folder)
    config = Config.model_validate({"rollout": {"use": "calculator"}, "sampling": {"max_tokens": max_tokens}})

    async def work(_: FakeEngine) -> tuple[Episode, str, str]:
        runner = RolloutRunner(config, config.rollout, model)
        texts = runner._texts
        engine = Writer(EngineOptions(model, max_model_len=200))
        engine.script, engine.prompt_tokens = tuple(texts.encode(script).tolist()), len(LEASE.prompt.tokens)
        await engine.start()
        await engine.load(bench.snapshot(1))
        attempt = Attempt("a", SamplingParams(max_tokens), 1)
        episode = await runner.run(engine, LEASE, attempt, lambda _: None)
        await engine.close()
        made = episode.completion
        observed = made.tokens[made.observed] if made.observed is not None else np.zeros(0, np.int32)
        return episode, texts.decode(made.tokens), texts.decode(observed)

    return bench.run(work)  # type: ignore[no-any-return]


def test_the_tool_writes_the_result_and_the_model_goes_on_behind_it(model: Path, tmp_path: Path) -> None:
    episode, text, observed = answered(model, tmp_path, "<<407+125=532>>532\n#### 532")
    assert text == "<<407+125=532>>532\n#### 532"
    assert observed == "532>>"
    assert episode.metrics == {"environment/calls": 1.0}
    assert episode.completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("script", ["3 = 3", "<<2**9=512>>", "<<1/0=0>>", "a<b=c", "<<2+2", "<<4", "", "<<=", "<<5>>="])
def test_where_there_is_nothing_to_work_out_the_model_writes_alone(model: Path, tmp_path: Path, script: str) -> None:
    episode, text, observed = answered(model, tmp_path, script)
    assert (text, observed) == (script, "")
    assert episode.metrics == {"environment/calls": 0.0}


def test_a_result_that_does_not_fit_ends_the_completion_for_lack_of_room(model: Path, tmp_path: Path) -> None:
    for room, written, told, calls in ((11, "<<407+125=53", "53", 1.0), (9, "<<407+125=", "", 0.0)):
        episode, text, observed = answered(model, tmp_path / str(room), "<<407+125=532>>532", max_tokens=room)
        assert (text, observed) == (written, told)
        assert episode.completion.finish_reason is FinishReason.LENGTH
        assert episode.metrics == {"environment/calls": calls}
