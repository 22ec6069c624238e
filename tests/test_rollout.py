"""What an engine is asked for: the seed says which generation it is, and a repeated one is the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import EngineOptions
from actors.fake_engine import FakeEngine
from actors.rollout import attempt_for, sampling_for, sampling_seed
from protocol.config import Config
from protocol.types import Completion, Lease, LeaseKind, Prompt, SamplingParams
from protocol.weights import SnapshotWriter, lay_out

SAMPLING = SamplingParams(max_tokens=12)
NUMBER = st.integers(0, 1 << 40)


def lease(kind: LeaseKind = LeaseKind.TRAIN, attempt: int = 1, failures: int = 0, number: int = 5) -> Lease:
    prompt = Prompt(number, 0, np.arange(1, 9, dtype=np.int32))
    return Lease(kind, prompt, attempt, samples=4, version=0, failures=failures, ttl_s=30.0)


@given(NUMBER, NUMBER, st.integers(0, 15))
def test_the_attempt_never_matters(attempt: int, other: int, sample: int) -> None:
    first = attempt_for(lease(attempt=attempt), "a", sample, SAMPLING, run_seed=3)
    assert first.seed == attempt_for(lease(attempt=other), "b", sample, SAMPLING, run_seed=3).seed


@given(st.integers(0, 2), st.integers(0, 2))
def test_a_failed_try_is_sampled_anew(failures: int, other: int) -> None:
    first = attempt_for(lease(failures=failures), "a", 0, SAMPLING, run_seed=3).seed
    second = attempt_for(lease(failures=other), "a", 0, SAMPLING, run_seed=3).seed
    assert (first == second) == (failures == other)


def test_prompts_samples_and_runs_all_have_seeds_of_their_own() -> None:
    seeds = {sampling_seed(run, prompt, sample, 0) for run in range(4) for prompt in range(50) for sample in range(8)}
    assert len(seeds) == 4 * 50 * 8
    assert sampling_seed(1, 23, 4, 0) != sampling_seed(12, 3, 4, 0)


@given(NUMBER, NUMBER, NUMBER, st.integers(0, 3))
def test_a_seed_is_a_natural_number_of_63_bits(run: int, prompt: int, sample: int, failures: int) -> None:
    assert 0 <= sampling_seed(run, prompt, sample, failures) < 1 << 63


def test_an_evaluation_is_greedy_and_needs_no_seed() -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    asked = attempt_for(lease(LeaseKind.EVALUATE), "a", 0, greedy, run_seed=3)
    assert asked.seed is None
    assert asked.sampling is greedy


def test_samples_of_a_lease_are_asked_for_under_different_names() -> None:
    names = {attempt_for(lease(), "train-5-1", sample, SAMPLING, 3).request_id for sample in range(4)}
    assert names == {f"train-5-1-{sample}" for sample in range(4)}


def test_a_lost_lease_is_generated_again_token_by_token(tmp_path: Path) -> None:
    async def generated(attempt: int, failures: int = 0, kind: LeaseKind = LeaseKind.TRAIN) -> Completion:
        engine = FakeEngine(EngineOptions(tmp_path, max_model_len=64))
        await engine.start()
        await engine.load(made)
        asked = attempt_for(lease(kind, attempt, failures), f"try-{attempt}", 2, SAMPLING, run_seed=3)
        prompt = lease().prompt
        completion = await engine.generate(asked.request_id, prompt.tokens, asked.sampling, asked.seed)
        await engine.close()
        return completion

    writer = SnapshotWriter(tmp_path / "v0", lay_out([("w", "float32", (8,))]))
    made = writer.finish(0)
    first, again, anew = (asyncio.run(generated(*args)) for args in ((1,), (2,), (3, 1)))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != anew.tokens.tolist()


def test_behind_the_samples_that_are_trained_comes_a_greedy_one_for_remax() -> None:
    config = Config.model_validate({"batch": {"group_size": 3}, "algorithm": {"advantage": "remax"}})
    assert config.samples_per_lease == 4
    asked = [
        attempt_for(lease(), "a", sample, sampling_for(lease(), sample, config), run_seed=3) for sample in range(4)
    ]
    assert [attempt.sampling.temperature for attempt in asked] == [1.0, 1.0, 1.0, 0.0]
    assert [attempt.seed is None for attempt in asked] == [False, False, False, True]
    assert {attempt.sampling.max_tokens for attempt in asked} == {config.sampling.max_tokens}


def test_without_remax_no_sample_of_training_is_greedy_and_every_one_of_an_evaluation_is() -> None:
    config = Config.model_validate({"batch": {"group_size": 3}, "evaluation": {"max_tokens": 7}})
    assert config.samples_per_lease == 3
    assert {sampling_for(lease(), sample, config).temperature for sample in range(3)} == {1.0}
    evaluated = sampling_for(lease(LeaseKind.EVALUATE), 0, config)
    assert (evaluated.temperature, evaluated.max_tokens) == (0.0, 7)
