"""The oracle: exact log-probabilities, weights swapped between two tokens, and loads that are refused as a whole."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import EngineOptions, EnginePoisoned, GenerationAborted, NotLoaded, RequestFailed
from actors.transformers_engine import TransformersEngine, sample
from protocol.types import Completion, FinishReason, SamplingParams
from tests.engines import all_reached, begin, outcome, prompts
from tests.locks import is_held
from tests.models import (
    EOS,
    hybrid_logprobs,
    make_tiny_qwen2,
    reference_logprobs,
    snapshot_from,
    snapshot_of,
    twin,
)

TOLERANCE = 1e-4


def with_engine(
    folder: Path, use: Callable[[TransformersEngine], Coroutine[Any, Any, Any]], recompute_cache: bool = True
) -> Any:
    async def run() -> Any:
        engine = TransformersEngine(EngineOptions(folder, max_model_len=256, recompute_cache=recompute_cache))
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def difference(logprobs: np.ndarray, behavior_logprobs: np.ndarray) -> float:
    return float(np.abs(logprobs - behavior_logprobs).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute_cache", [True, False])
def test_tokens_on_both_sides_of_an_update_have_the_logprobs_of_their_weights(
    tmp_path: Path, tied: bool, recompute_cache: bool
) -> None:
    old = make_tiny_qwen2(tmp_path / "model", tied)
    new = twin(old, seed=1)
    questions = prompts(3)

    async def use(engine: TransformersEngine) -> list[Completion]:
        await engine.load(snapshot_of(old, tmp_path, 4))
        tasks = begin(engine, questions, SamplingParams(60, 0.7))
        await all_reached(engine, 3, 20)
        times = await engine.load(snapshot_of(new, tmp_path, 5))
        assert 0 < times.load_s < 60
        return await asyncio.gather(*tasks)

    for question, completion in zip(questions, with_engine(tmp_path / "model", use, recompute_cache), strict=True):
        first, second = completion.spans
        assert (first.version, first.start, second.version, second.end) == (4, 0, 5, 60)
        assert first.end == second.start >= 20
        behavior, cut = completion.behavior_logprobs, first.end
        assert difference(reference_logprobs(old, question, completion, 0.7)[:cut], behavior[:cut]) < TOLERANCE
        by_new = reference_logprobs(new, question, completion, 0.7)[cut:]
        hybrid = hybrid_logprobs(old, new, question, completion, 0.7)
        right, wrong = (by_new, hybrid) if recompute_cache else (hybrid, by_new)
        assert difference(right, behavior[cut:]) < TOLERANCE
        assert difference(wrong, behavior[cut:]) > 1e-2


def test_a_loaded_snapshot_is_let_go_for_the_learner_to_write_over(tmp_path: Path) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=True)

    async def use(engine: TransformersEngine) -> Path:
        snapshot = snapshot_of(model, tmp_path, 0)
        await engine.load(snapshot)
        assert is_held(snapshot.folder)
        return snapshot.folder

    assert not is_held(with_engine(tmp_path / "model", use))


def test_equal_seeds_give_equal_tokens_whatever_runs_beside_them(tmp_path: Path) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=True)

    async def use(engine: TransformersEngine) -> None:
        await engine.load(snapshot_of(model, tmp_path, 0))
        [question] = prompts(1)
        alone = await engine.generate("alone", question, SamplingParams(20), 5)
        same, other = await asyncio.gather(*begin(engine, [question, question], SamplingParams(20), "pair", seed=5))
        assert alone.tokens.tolist() == same.tokens.tolist() != other.tokens.tolist()
        free = [await engine.generate(f"free{i}", question, SamplingParams(20), None) for i in range(2)]
        assert free[0].tokens.tolist() != free[1].tokens.tolist()

    with_engine(tmp_path / "model", use)


def test_the_end_of_sequence_ends_a_completion_and_is_part_of_it(tmp_path: Path) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are zero: every token is as likely as any other

    async def use(engine: TransformersEngine) -> list[Completion]:
        await engine.load(snapshot_of(model, tmp_path, 0))
        return await asyncio.gather(*begin(engine, prompts(8), SamplingParams(150)))

    completions = with_engine(tmp_path / "model", use)
    assert FinishReason.STOP in {completion.finish_reason for completion in completions}
    for completion in completions:
        stopped = completion.finish_reason is FinishReason.STOP
        assert (completion.tokens[-1] == EOS) == stopped
        assert EOS not in completion.tokens[:-1]
        np.testing.assert_allclose(completion.behavior_logprobs, -math.log(200), atol=1e-5)


@pytest.mark.parametrize("harm", ["missing", "shape", "name"])
def test_after_a_load_that_failed_nothing_is_served_ever_again(tmp_path: Path, harm: str) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = tensors.pop(name)
    if harm != "missing":
        tensors[name if harm == "shape" else "other"] = tensor[:-1] if harm == "shape" else tensor

    async def use(engine: TransformersEngine) -> None:
        await engine.load(snapshot_of(model, tmp_path, 0))
        [task] = begin(engine, prompts(1), SamplingParams(200))
        await all_reached(engine, 1, 5)
        error = await outcome(engine.load(snapshot_from(tensors, tmp_path, 1)))
        assert isinstance(error, EnginePoisoned)
        assert "version 1 failed half-way" in str(error)
        assert ("k_proj" in str(error)) == (harm != "name")
        for call in (task, engine.generate("later", prompts(1)[0], SamplingParams(2), 0)):
            assert isinstance(await outcome(call), EnginePoisoned)
        assert isinstance(await outcome(engine.load(snapshot_of(model, tmp_path, 2))), EnginePoisoned)
        with pytest.raises(EnginePoisoned):
            engine.statistics()

    with_engine(tmp_path / "model", use)


def test_requests_before_the_first_load_too_long_or_aborted_raise(tmp_path: Path) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=True)

    async def use(engine: TransformersEngine) -> None:
        [question] = prompts(1)
        early = await outcome(engine.generate("early", question, SamplingParams(2), 0))
        assert isinstance(early, NotLoaded)
        await engine.load(snapshot_of(model, tmp_path, 0))
        refused = await outcome(engine.generate("long", prompts(1, length=256)[0], SamplingParams(2), 0))
        assert isinstance(refused, RequestFailed)
        [task] = begin(engine, [question], SamplingParams(200))
        await all_reached(engine, 1, 5)
        await engine.abort_all()
        assert isinstance(await outcome(task), GenerationAborted)
        whole = await engine.generate("whole", question, SamplingParams(1000), 0)
        assert (len(whole.tokens), whole.finish_reason) == (256 - 40, FinishReason.LENGTH)

    with_engine(tmp_path / "model", use)


def test_sampling_follows_the_distribution_that_its_logprobs_say() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    random = torch.Generator().manual_seed(0)
    sampling = SamplingParams(1, temperature=0.5)
    draws = [sample(logits, sampling, random) for _ in range(20_000)]
    weights = [math.exp(2 * x) for x in logits.tolist()]
    for token, weight in enumerate(weights):
        expected = weight / sum(weights)
        assert abs(sum(draw.token == token for draw in draws) / len(draws) - expected) < 0.01
        assert all(math.isclose(math.exp(d.logprob), expected, rel_tol=1e-5) for d in draws if d.token == token)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (SamplingParams(1, top_k=2), {0, 1}),
        (SamplingParams(1, top_p=0.8), {0, 1}),  # probabilities 0.64, 0.24, 0.09, 0.03
        (SamplingParams(1, top_p=0.6), {0}),
        (SamplingParams(1, top_p=0.9), {0, 1, 2}),
        (SamplingParams(1, temperature=0.0), {0}),
    ],
)
def test_truncated_sampling_keeps_the_likeliest_and_renormalises(sampling: SamplingParams, kept: set[int]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    random = torch.Generator().manual_seed(0)
    draws = {sample(logits, sampling, random) for _ in range(2000)}
    assert {draw.token for draw in draws} == kept
    if sampling.temperature:
        assert math.isclose(sum(math.exp(draw.logprob) for draw in draws), 1.0, rel_tol=1e-5)
    else:
        assert math.isclose(draws.pop().logprob, float(logits.log_softmax(-1)[0]), rel_tol=1e-5)
