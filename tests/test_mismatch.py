"""The mismatch curves against scalar derivations, and an unmoved policy that has none at any temperature."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine import EngineOptions
from actors.transformers_engine import TransformersEngine
from learner.batches import Row, pack
from learner.corrections import corrections
from learner.mismatch import OLDEST_AGE, SUM_NAMES, mismatch_curves, mismatch_sums
from learner.ranks import Ranks
from protocol.algorithm import CorrectionsConfig
from protocol.types import Completion, SamplingParams, Tokens
from tests.engines import begin, prompts
from tests.learning import model_folder, open_policy
from tests.models import snapshot_of

# (log ratio, age, advantage) of tokens by sequence
SEQUENCES = [
    [(0.0, 0, 1.0), (0.02, 0, 1.0), (-0.7, 1, 1.0)],
    [(1.1, 2, -1.0)],
    [(-0.9, 3, -1.0), (-0.8, 3, -1.0), (0.1, 9, -1.0), (-0.2, 40, -1.0)],
    [(22.0, 0, 0.5), (-23.0, 1, 0.5)],
]
SETTINGS = CorrectionsConfig(bound="mask", low=0.5, high=2.0, negative_kl_mask=0.4)


def sums_of(settings: CorrectionsConfig, sequences: list[list[tuple[float, int, float]]]) -> torch.Tensor:
    tokens = [token for sequence in sequences for token in sequence]
    log_ratios, ages, advantages = (list(column) for column in zip(*tokens, strict=True))
    proximal = torch.linspace(-3.0, -1.0, len(tokens), dtype=torch.float64)
    behavior = proximal - torch.tensor(log_ratios, dtype=torch.float64)
    ids = torch.tensor([i for i, sequence in enumerate(sequences) for _ in sequence])
    got = corrections(settings, behavior, proximal, torch.tensor(advantages, dtype=torch.float64), ids, len(sequences))
    return mismatch_sums(settings, got, behavior, proximal, torch.tensor(ages, dtype=torch.int32), ids, len(sequences))


def curves_of(sums: torch.Tensor) -> dict[str, float]:
    return mismatch_curves(dict(zip(SUM_NAMES, sums.tolist(), strict=True)))


def slow_curves(sequence_ratio: str) -> dict[str, float]:
    """Everything but the quantiles, token by token."""
    ratios, k1s, k3s, outside, masked = [], [], [], [], []
    by_age: dict[int, list[tuple[float, float]]] = {}
    of_sequences = []
    for sequence in SEQUENCES:
        total = sum(log_ratio for log_ratio, _, _ in sequence)
        log_of_sequence = total if sequence_ratio == "product" else total / len(sequence)
        of_sequences.append(math.exp(max(-20.0, min(20.0, log_of_sequence))))
        for log_ratio, age, advantage in sequence:
            clamped = max(-20.0, min(20.0, log_ratio))
            ratio = math.exp(clamped)
            ratios.append(ratio)
            k1s.append(-clamped)
            k3s.append(ratio - 1.0 - clamped)
            outside.append(not 0.5 <= ratio <= 2.0)
            masked.append(advantage < 0 and -total / len(sequence) > 0.4)
            by_age.setdefault(min(age, 8), []).append((ratio, ratio - 1.0 - clamped))
    n = len(ratios)
    curves = {
        "kl": sum(k3s) / n,
        "kl_k1": sum(k1s) / n,
        "ratio_mean": sum(ratios) / n,
        "chi2": sum(r * r for r in ratios) / n - 1.0,
        "ess": sum(ratios) ** 2 / (n * sum(r * r for r in ratios)),
        "sequence_ess": sum(of_sequences) ** 2 / (len(SEQUENCES) * sum(r * r for r in of_sequences)),
        "outside_frac": sum(outside) / n,
        "negative_masked_frac": sum(masked) / n,
        "rejected_frac": sum(a or b for a, b in zip(outside, masked, strict=True)) / n,
    }
    for age, of_age in by_age.items():
        curves[f"age_{age}_ratio_mean"] = sum(ratio for ratio, _ in of_age) / len(of_age)
        curves[f"age_{age}_kl"] = sum(k3 for _, k3 in of_age) / len(of_age)
    return {f"mismatch/{name}": value for name, value in curves.items()}


@pytest.mark.parametrize("sequence_ratio", ["product", "geometric_mean"])
def test_curves_equal_a_scalar_derivation(sequence_ratio: str) -> None:
    settings = SETTINGS.model_copy(update={"sequence_ratio": sequence_ratio})
    curves = curves_of(sums_of(settings, SEQUENCES))
    quantiles = {f"mismatch/ratio_{name}" for name in ("p01", "p50", "p99")}
    wanted = slow_curves(sequence_ratio)
    assert curves.keys() == wanted.keys() | quantiles
    assert {name: curves[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert 0 < wanted["mismatch/negative_masked_frac"] < wanted["mismatch/rejected_frac"] < 1


def test_sums_add_up_over_micro_batches_and_ranks() -> None:
    parts = [sums_of(SETTINGS, SEQUENCES[:1]), sums_of(SETTINGS, SEQUENCES[1:3]), sums_of(SETTINGS, SEQUENCES[3:])]
    torch.testing.assert_close(sum(parts), sums_of(SETTINGS, SEQUENCES), rtol=1e-12, atol=1e-12)


def test_every_sum_has_its_own_name() -> None:
    assert len(set(SUM_NAMES)) == len(SUM_NAMES) == len(sums_of(SETTINGS, SEQUENCES))


@pytest.mark.parametrize("spread", [0.002, 0.1, 1.5])
def test_quantiles_are_those_of_the_whole_batch_to_the_width_of_a_bin(spread: float) -> None:
    log_ratios = np.random.default_rng(1).normal(-spread, spread, 5000)
    curves = curves_of(sums_of(SETTINGS, [[(float(x), 0, 1.0)] for x in log_ratios]))
    for name, share in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        wanted = float(np.quantile(log_ratios, share))
        assert math.log(curves[f"mismatch/ratio_{name}"]) == pytest.approx(wanted, rel=0.08, abs=0.0004)


def test_an_unmoved_policy_has_no_mismatch() -> None:
    curves = curves_of(sums_of(SETTINGS, [[(0.0, 0, -1.0)] * 5, [(0.0, 2, 1.0)] * 3]))
    ones = {"ratio_mean", "ess", "sequence_ess", "age_0_ratio_mean", "age_2_ratio_mean"}
    for name, value in curves.items():
        if "ratio_p" in name:
            assert value == pytest.approx(1.0, abs=4e-4)
        else:
            assert value == (1.0 if name.removeprefix("mismatch/") in ones else 0.0), name


def test_a_batch_without_a_token_gives_finite_curves_and_no_age() -> None:
    nothing, no_ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    got = corrections(SETTINGS, nothing, nothing, nothing, no_ids, 0)
    curves = curves_of(mismatch_sums(SETTINGS, got, nothing, nothing, no_ids, no_ids, 0))
    assert all(math.isfinite(value) for value in curves.values())
    assert not any("age" in name for name in curves)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_not_finite_stops_no_statistics(value: float) -> None:
    """The step is about to be skipped; its curves must not be what ends the run."""
    proximal, behavior = torch.tensor([-1.0, value]), torch.tensor([-1.0, -1.0])
    ids = torch.zeros(2, dtype=torch.int64)
    got = corrections(SETTINGS, behavior, proximal, torch.ones(2), ids, 1)
    curves = curves_of(mismatch_sums(SETTINGS, got, behavior, proximal, ids, ids, 1))
    assert math.isnan(curves["mismatch/kl"]) == math.isnan(value)


def test_ages_beyond_the_oldest_are_counted_with_it() -> None:
    curves = curves_of(sums_of(SETTINGS, [[(0.1, OLDEST_AGE, 1.0), (0.3, OLDEST_AGE + 5, 1.0)]]))
    wanted = (math.exp(0.1) + math.exp(0.3)) / 2
    assert curves[f"mismatch/age_{OLDEST_AGE}_ratio_mean"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_at_the_sampling_temperature_an_unmoved_policy_has_ratio_1(
    tmp_path: Path, ranks: Ranks, temperature: float
) -> None:
    """Generator and learner divide the logits alike; a learner that forgot to would be far off, as the end shows."""
    path = model_folder(tmp_path / "model")
    questions = prompts(3, length=9)
    rows = [
        Row(
            prompt_tokens=question,
            completion_tokens=completion.tokens,
            in_loss=np.ones(len(completion.tokens), dtype=np.bool_),
            behavior_logprobs=completion.behavior_logprobs,
            versions=np.zeros(len(completion.tokens), dtype=np.int32),
        )
        for question, completion in zip(questions, sampled(path, questions, temperature, tmp_path), strict=True)
    ]
    policy = open_policy(path, ranks, temperature=temperature)
    batches = pack(rows, 30)

    def curves(proximal: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, float]]:
        weights, total = [], torch.zeros(len(SUM_NAMES), dtype=torch.float64)
        for batch, logprobs in zip(batches, proximal, strict=True):
            of = (batch.behavior_logprobs, logprobs)
            ids = (batch.sequence_ids, batch.num_sequences)
            got = corrections(CorrectionsConfig(), *of, torch.ones(len(logprobs)), *ids)
            weights.append(got.weights)
            total += mismatch_sums(CorrectionsConfig(), got, *of, batch.versions, *ids)
        return weights, curves_of(total)

    weights, matched = curves(policy.logprobs(batches))
    torch.testing.assert_close(torch.cat(weights), torch.ones(sum(map(len, weights))), rtol=0.0, atol=1e-4)
    assert matched["mismatch/kl"] < 1e-8
    _, unmatched = curves(policy.logprobs(batches, temperature=2.0 * temperature))
    assert unmatched["mismatch/kl"] > 1e-2


def sampled(path: str, questions: list[Tokens], temperature: float, folder: Path) -> list[Completion]:
    """Ten tokens for each question, of the model at `path`, by the transformers engine."""

    async def run() -> Any:
        engine = TransformersEngine(EngineOptions(Path(path), max_model_len=64))
        await engine.start()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            await engine.load(snapshot_of(model, folder, 0))
            sampling = SamplingParams(max_tokens=10, temperature=temperature)
            return await asyncio.gather(*begin(engine, questions, sampling))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 60))
