"""The bench of the learner on a tiny configuration: real processes, numbers that are possible."""

from __future__ import annotations

import json

import pytest

from bench.learner import main

SMALL = ["--vocabulary", "40000", "--tokens", "512", "--hidden", "8", "--chunks", "16", "--size", "tiny"]


def test_the_bench_of_the_learner_prints_memory_and_speed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--turns", "1", "--threads", "1"]) == 0
    said = capfd.readouterr().out
    result = json.loads(said.splitlines()[-1])
    reference, chunks, whole = result["memory"]
    logits_mib = 512 * 40_000 * 4 / 2**20
    assert reference["of_reference"] == 1.0
    assert whole["peak_mib"] > 2 * logits_mib > 4 * chunks["peak_mib"]
    assert chunks["peak_mib"] > 2 * logits_mib * 16 / 512
    speed = result["speed"]
    assert speed["of_bare"] == pytest.approx(speed["tokens_per_s"] / speed["bare_tokens_per_s"], rel=0.01)
    assert 0.0 < speed["prepare_share"] < 1.0
    assert 0.0 < speed["updates_prepare_share"] < 1.0
    for line in ("head in chunks of 16 tokens", "head without chunks", "bare loop", "learner, 4 updates"):
        assert line in said
