"""A share of more than 20 MiB, from results on the wire to completions at the learner, over a line that breaks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from protocol.addresses import Addresses
from protocol.codec import MAX_ARRAY_BYTES
from protocol.messages import FetchManifest, LeaseItem, Leases, ManifestAnswer, Pull, Result, Role, Verdict
from protocol.shares import PAGE_BYTES
from protocol.types import ShareItem
from tests.broker_process import BrokerProcess, run_on_disk
from tests.raw_peer import RawPeer
from tests.small_run import VOCABULARY, ScriptedLearner
from tests.tcp_proxy import TcpProxy

PROMPTS, SAMPLES, LENGTH = 4, 3, 200_000
BYTES = PROMPTS * SAMPLES * LENGTH * 9  # a token, its log-probability, its mark


def long_result(generator: RawPeer, lease: LeaseItem, sample: int) -> Result:
    rng = np.random.default_rng([lease.number, sample])
    return Result(
        epoch=generator.epoch,
        prompt=lease.number,
        attempt=lease.attempt,
        sample=sample,
        spans=[(0, 0, LENGTH)],
        reward=float(sample),
        rewards={"reward:score": float(sample)},
        tokens=rng.integers(1, VOCABULARY, LENGTH).astype(np.int32),
        behavior_logprobs=-rng.random(LENGTH, np.float32),
        observed=np.zeros(0, np.bool_),
    )


def generate(generator: RawPeer) -> dict[tuple[int, int], Result]:
    """Answer the leases of one batch; the results by (prompt, sample)."""
    manifest = generator.ask(FetchManifest(version=0))
    assert isinstance(manifest, ManifestAnswer)
    granted = generator.ask(Pull(version=0, digest=manifest.digest, room=PROMPTS * SAMPLES))
    assert isinstance(granted, Leases)
    results = [long_result(generator, lease, sample) for lease in granted.leases for sample in range(SAMPLES)]
    answers = generator.ask_all([generator.frames(result) for result in results], in_flight=2)
    assert [answer.message for answer in answers] == [Verdict(status="accepted")] * len(results)
    return {(result.prompt, result.sample): result for result in results}


def assert_same(item: ShareItem, sent: Result) -> None:
    np.testing.assert_array_equal(item.completion.tokens, sent.tokens)
    np.testing.assert_array_equal(item.completion.behavior_logprobs, sent.behavior_logprobs)


def test_a_share_of_many_pages_arrives_whole_although_the_line_breaks_inside_of_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.5)  # what was lost is asked again sooner than in life
    config = run_on_disk(tmp_path, sampling={"max_tokens": LENGTH}, watchdog={"lease_ttl_s": 600.0})
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerProcess(tmp_path))
        broker.serves()
        generator = stack.enter_context(RawPeer(tmp_path, Role.GENERATOR))
        control, bulk = Addresses.read(tmp_path)
        line = stack.enter_context(TcpProxy(bulk))
        line.down.cut_at += [PAGE_BYTES // 2, 3 * PAGE_BYTES, 5 * PAGE_BYTES]
        (tmp_path / "broker.json").write_text(json.dumps({"control": control, "bulk": line.address, "run_id": "test"}))
        learner = stack.enter_context(ScriptedLearner(tmp_path, config))
        generator.hello()
        before = broker.rss_bytes
        results = generate(generator)
        assert learner.step()
        at_most, kept = broker.peak_rss_bytes - before, broker.rss_bytes - before
    (taken,) = learner.trained
    assert {(item.prompt, item.sample) for item in taken.share.items} == set(results)
    for item in taken.share.items:
        assert_same(item, results[item.prompt, item.sample])
    print(f"\na share of {BYTES / 1e6:.1f} MB: {line.down.num_bytes / 1e6:.1f} MB down, memory +{at_most / 1e6:.1f} MB")
    print(f"while it was taken, +{kept / 1e6:.1f} MB afterwards")
    assert BYTES > 20 << 20 > 2 * MAX_ARRAY_BYTES
    assert line.num_connections == 4
    assert BYTES < line.down.num_bytes < BYTES + 4 * PAGE_BYTES, "three pages came again in part, no other"
    assert at_most < 4 * BYTES, "results, pages of them, and pages on their way"
    assert kept < 2 * BYTES
