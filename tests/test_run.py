"""The whole loop around engine and optimizer, on real sockets:

what is promised of leases, epochs, weights and the ledger.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgpack
import pytest

from broker.service import Service
from learner.link import Standing, Taken
from tests.small_run import FakeGenerator, ScriptedLearner, broker, make_run


def test_a_run_trains_every_prompt_once_within_the_bound_and_ends(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner:
        two = (FakeGenerator(tmp_path, config), FakeGenerator(tmp_path, config, "generator-1"))
        with two[0], two[1]:
            while learner.step():
                pass
    assert learner.finished.kind == "complete"
    assert sorted(learner.prompts) == list(range(40))
    assert msgpack.unpackb(learner.trained[-1].ledger)["trained"] == 40


def test_each_completion_records_which_version_sampled_each_token(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 12})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner:
        slow = FakeGenerator(tmp_path, config, step_s=0.02)
        with slow:
            while learner.step():
                pass
    completions = [item.completion for taken in learner.trained for item in taken.share.items]
    assert all(span.end > span.start for completion in completions for span in completion.spans)
    assert all(completion.spans[-1].end == len(completion.tokens) for completion in completions)
    assert any(len(completion.spans) > 1 for completion in completions), "no weights were swapped in mid-sentence"


def test_a_generator_on_another_host_pulls_its_weights_in_verified_chunks(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 3})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config, size=3 << 20) as learner:
        generator = FakeGenerator(tmp_path, config, host="elsewhere")
        with generator:
            while learner.step():
                pass
            assert generator.engine is not None
            assert generator.engine.held is not None
    assert len(learner.trained) == 3


def test_a_generator_that_vanishes_costs_nothing_but_time(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0}, watchdog={"heartbeat_s": 0.2, "lease_ttl_s": 1.0})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner, FakeGenerator(tmp_path, config):
        doomed = FakeGenerator(tmp_path, config, "doomed", step_s=0.05).__enter__()
        assert learner.step()
        doomed.vanish()
        while learner.step():
            pass
    assert sorted(learner.prompts) == list(range(40))


def test_a_broker_that_dies_is_restored_from_what_the_learner_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "farewells", lambda service: [])  # a broker that dies says nothing
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    first = broker(tmp_path, config)
    epoch = first.__enter__().epoch
    with ScriptedLearner(tmp_path, config) as learner, FakeGenerator(tmp_path, config):
        for _ in range(4):
            assert learner.step()
        first.__exit__(None, None, None)
        with broker(tmp_path, config) as second:
            while learner.step():
                pass
            assert second.epoch != epoch
            status = second.status(time.monotonic())
    assert sorted(learner.prompts) == list(range(40))
    assert status["ledger"]["trained"] == 40


def test_a_learner_that_resumes_gets_the_same_prompts_again_and_no_other_twice(tmp_path: Path) -> None:
    """The first learner dies after step 5 with its last checkpoint at version 3."""
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    with broker(tmp_path, config), FakeGenerator(tmp_path, config):
        with ScriptedLearner(tmp_path, config) as first:
            for _ in range(5):
                assert first.step()
            surviving = first.trained[:3]
        with ScriptedLearner(tmp_path, config, Standing(3, -1, surviving[-1].ledger)) as second:
            while second.step():
                pass
    kept = [prompt for taken in surviving for prompt in sorted({item.prompt for item in taken.share.items})]
    assert sorted(kept + second.prompts) == list(range(40))


def test_prompts_of_a_skipped_step_stay_failed_after_a_resume(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    with broker(tmp_path, config) as service, FakeGenerator(tmp_path, config):
        with ScriptedLearner(tmp_path, config) as first:
            assert first.step()
            taken = first.link.take(1, lambda: None)
            assert isinstance(taken, Taken)
            first.link.agreed(taken)
            first.version = 2
            first.publish()
            first.link.advance(2, skipped=True)
            running = service.status(time.monotonic())["ledger"]
        with ScriptedLearner(tmp_path, config, Standing(2, -1, taken.ledger, skipped=True)) as second:
            resumed = service.status(time.monotonic())["ledger"]
            while second.step():
                pass
        ledger = service.status(time.monotonic())["ledger"]
    assert (running["trained"], running["failed/non_finite"]) == (4, 4)
    assert (resumed["trained"], resumed["failed/non_finite"]) == (4, 4)
    assert (ledger["trained"], ledger["failed/non_finite"]) == (36, 4)


def test_an_evaluation_answers_every_held_out_prompt_with_one_version(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 4}, evaluation={"every": 2})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner, FakeGenerator(tmp_path, config):
        learner.link.evaluate(0)
        while learner.version < 4:
            assert learner.step()
        learner.link.evaluate(4)
        assert not learner.step()
        learner.link.refresh()
        evaluations = learner.link.evaluations()
    assert learner.finished.kind == "complete"
    assert evaluations[-1].version == 4
    assert {evaluation.num_prompts for evaluation in evaluations} == {6}
    assert all(sample["completion"] for sample in evaluations[-1].samples)


def test_k_completions_of_two_sources_are_scored_by_both_functions_and_pinned_to_their_version(tmp_path: Path) -> None:
    """The lenient function fails on some: those completions are counted, and in no number."""
    reward = tmp_path / "reward.py"
    config = make_run(
        tmp_path,
        run={"steps": 3},
        evaluation={
            "every": 2,
            "samples": 4,
            "temperature": 1.0,
            "max_prompts": 5,
            "rewards": [{"use": f"{reward}:lenient"}],
            "prompts_written": 3,
        },
    )
    reward.write_text(
        "def score(completion, answer):\n    return float(len(completion) % 3 == 0)\n\n"
        "def lenient(completion, answer):\n"
        "    if len(completion) % 4 == 0: raise KeyError('bad')\n"
        "    return {'score': 1.0, 'pred': len(completion)}\n"
    )
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"question": f"w{n}", "answer": "none"}) for n in range(1, 4)))
    sources = f"{tmp_path / 'data'},{other}"
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": sources})})
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner, FakeGenerator(tmp_path, config):
        learner.link.evaluate(0)
        while learner.step():
            pass
        learner.link.refresh()
        last = learner.link.evaluations()[-1]
    assert (last.version, last.num_prompts, last.samples_per_prompt) == (3, 5, 4)
    rows = {(row["source"], row["function"]): row for row in last.scores}
    assert {source for source, _ in rows} == {"", "data", "other.jsonl"}
    strict, lenient = rows["", "reward:score"], rows["", "reward:lenient"]
    assert strict["completions"] == lenient["completions"] == 20 - last.errors
    assert 0 < last.errors < 20
    assert [rows[source, "reward:score"]["prompts"] for source in ("data", "other.jsonl")] == [3, 2], "spread evenly"
    assert last.accuracy == strict["metrics"]["mean@4"]
    assert lenient["metrics"]["mean@4"] == lenient["metrics"]["maj@4"] == 1.0
    assert "maj@4" not in strict["metrics"], "it says nothing of an answer"
    lines = (tmp_path / "evaluations" / "version_000003.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [(line["prompt_number"], line["sample"]) for line in written] == [(p, s) for p in range(3) for s in range(4)]
    assert all(("error" in line) != ("completion" in line) for line in written)
    assert {span[0] for line in written for span in line.get("versions", [])} == {3}
    assert all(line["answers"] for line in written if "answers" in line)


def test_a_reward_that_raises_is_an_error_that_is_counted_and_quarantined_never_a_zero(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    (tmp_path / "reward.py").write_text(
        "def score(completion, answer):\n    if len(completion) % 7 == 0: raise KeyError('bad')\n    return 1.0\n"
    )
    with (
        broker(tmp_path, config) as service,
        ScriptedLearner(tmp_path, config) as learner,
        FakeGenerator(tmp_path, config),
    ):
        while learner.step():
            pass
        ledger = service.status(time.monotonic())["ledger"]
    rewards = [value for taken in learner.trained for value in taken.share.rewards.ravel() if value == value]
    assert set(rewards) == {1.0}
    assert ledger["trained"] + ledger["failed"] == 40
    assert ledger["trained"] == len(set(learner.prompts))


def test_prompts_that_are_too_long_are_skipped_and_counted(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    data = tmp_path / "data" / "train.jsonl"
    data.write_text(data.read_text() + '\n{"question": "' + "w5 " * 40 + '", "answer": "none"}' * 1)
    with (
        broker(tmp_path, config) as service,
        ScriptedLearner(tmp_path, config) as learner,
        FakeGenerator(tmp_path, config),
    ):
        while learner.step():
            pass
        ledger = service.status(time.monotonic())["ledger"]
    assert ledger["filtered/prompt_too_long"] == 1
    assert ledger["trained"] == 40
