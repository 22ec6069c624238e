"""What the broker does for generators: leases out, results in; what it refuses in which words; without sockets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.messages import (
    Bye,
    Done,
    Evaluate,
    FetchChunk,
    FetchFile,
    FetchManifest,
    Leases,
    Pull,
    Release,
    Result,
    Role,
    Wait,
)
from tests.broker_alone import BrokerAlone, manifest


def test_a_generator_without_the_learner_or_its_weights_waits_and_is_told_for_what(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    generator = broker.generator()
    assert generator.pull(0) == Wait(reason="waiting for the learner")
    learner = broker.peer(Role.LEARNER, "learner-0")
    generator.hello()
    assert generator.pull(0) == Wait(reason="waiting for the learner")
    learner.publish(0)
    assert generator.ask(Pull(version=0, digest="other weights", room=9)) == Wait(
        reason="unknown_version", version=0, digest=manifest(0).digest
    )
    assert isinstance(generator.pull(0), Leases)


def test_one_answer_never_carries_more_leases_than_its_message_may(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, num_rows=700, batch={"prompts": 600, "group_size": 2}, generators={"engine": "fake"})
    broker.learner()
    generator = broker.generator()
    assert len(generator.leases(0, room=100_000)) <= 256
    assert len(generator.leases(0, room=100_000)) > 0


def test_what_does_not_fit_into_one_answer_comes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.generator_desk.LEASES_BYTES", 80)
    broker = BrokerAlone(tmp_path, evaluation={"every": 1})
    learner, generator = broker.learner(), broker.generator()
    learner.ask(Evaluate(version=0))
    seen = []
    for _ in range(30):
        answer = generator.pull(0)
        if isinstance(answer, Wait):
            break
        seen += [(lease.kind, lease.number) for lease in answer.leases]
        assert len(answer.leases) < 5
    assert [number for kind, number in seen if kind == "evaluate"] == list(range(6))
    assert [number for kind, number in seen if kind == "train"] == list(range(12))  # P * (S + 1)


def test_who_asked_when_only_prompts_came_that_are_too_long_is_answered_again_at_once(tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        train = folder / "data" / "train.jsonl"
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        for row in rows[:12]:
            row["question"] = "w1 " * 17
        train.write_text("\n".join(map(json.dumps, rows)))

    broker = BrokerAlone(tmp_path, prepare, data={"shuffle": False})
    broker.learner()
    generator = broker.generator()
    broker.service.changed = False
    assert generator.pull(0) == Wait(reason="prompts were skipped", version=0, digest=manifest(0).digest)
    assert broker.service.changed
    assert generator.leases(0)[0].number == 12


def test_leases_that_did_not_reach_anybody_are_free_at_once_and_nobodys_crash(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    dead, other = broker.generator("dead"), broker.generator("other")
    answer = dead.pull(0)
    assert isinstance(other.pull(0), Wait)
    broker.service.undelivered(answer)
    assert isinstance(answer, Leases)
    assert [lease.number for lease in other.leases(0)] == [lease.number for lease in answer.leases]
    assert broker.run.scheduler is not None
    assert broker.run.scheduler.ledger.crashes(0) == 0


def test_a_result_for_a_lease_of_another_is_late(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    holder, thief = broker.generator("holder"), broker.generator("thief")
    lease = holder.leases(0)[0]
    verdict = thief.deliver(thief.result(lease, 0))
    assert (verdict.status, verdict.reason) == ("late", "this lease is not yours any more")
    thief.ask(Release(number=lease.number, attempt=lease.attempt, reason="mine", failed=True))
    assert thief.beat(leases=[(lease.number, lease.attempt, 5)]).revoked == [(lease.number, lease.attempt)]
    assert holder.beat(leases=[(lease.number, lease.attempt, 5)]).revoked == []
    assert holder.deliver(holder.result(lease, 0)).status == "accepted"


def test_nobody_keeps_the_leases_of_the_dead_alive(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    dead, other = broker.generator("dead"), broker.generator("other")
    lost = [(lease.number, lease.attempt, 1) for lease in dead.leases(0)]
    for _ in range(8):
        broker.now += broker.config.watchdog.lease_ttl_s / 4
        other.beat(leases=lost)
        broker.tick()
    assert {lease.number for lease in other.leases(0)} == {number for number, _, _ in lost}


def test_the_wrong_prompt_of_the_right_lease_is_late(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    lease = generator.leases(0)[0]
    assert generator.deliver(generator.result(lease, 0, prompt=lease.number + 1)).status == "late"
    assert generator.deliver(generator.result(lease, 0)).status == "accepted"


def test_a_result_of_an_earlier_epoch_is_stale_also_while_nobody_knows_the_run(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    old = generator.result(generator.leases(0)[0], 0)
    learner.incarnation = 2
    learner.hello()
    generator.hello()
    assert generator.deliver(old).status == "stale_epoch"
    unknown = BrokerAlone(tmp_path / "next").generator()
    assert unknown.deliver(old).status == "stale_epoch"


def test_a_result_that_came_twice_is_counted_once(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    result = generator.result(generator.leases(0)[0], 0)
    assert [generator.deliver(result).status for _ in range(2)] == ["accepted", "duplicate"]
    assert broker.observer().status()["results"] == {"accepted": 1, "duplicate": 1}


def test_an_invalid_result_is_counted_and_answered_with_its_reason_each_time(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    bad = generator.result(generator.leases(0)[0], 0, reward=float("nan"))
    for _ in range(2):
        verdict = generator.deliver(bad)
        assert (verdict.status, verdict.reason) == ("invalid", "a reward of nan, -1e+06 to 1e+06 are allowed")
    assert broker.observer().status()["results"] == {"invalid": 2}


def test_a_nan_reward_never_reaches_a_batch(tmp_path: Path) -> None:
    """What is NaN in a reward table is missing, and nothing of it is trained."""
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        for sample in range(3):
            fields = {"reward": float("nan")} if sample == 1 else {}
            generator.deliver(generator.result(lease, sample, **fields))
    page = learner.take(0)
    assert {*page.samples.tolist()} == {0, 2}
    assert [bool(missing) for missing in (page.rewards != page.rewards).all(axis=0)] == [False, True, False]


def test_a_generator_that_starts_anew_loses_its_leases_at_once(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    before = broker.generator(incarnation=1).leases(0)
    after = broker.generator(incarnation=2).leases(0)
    assert [lease.number for lease in after] == [lease.number for lease in before]
    assert not {lease.attempt for lease in after} & {lease.attempt for lease in before}
    assert broker.run.scheduler is not None
    assert broker.run.scheduler.ledger.crashes(after[0].number) == 1


def test_a_generator_that_says_goodbye_hands_its_leases_back_and_nothing_is_counted(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    leaving = broker.generator("leaving")
    before = leaving.leases(0)
    leaving.ask(Bye(reason="leaves"))
    after = broker.generator("other").leases(0)
    assert [(lease.number, lease.failures) for lease in after] == [(lease.number, 0) for lease in before]
    assert broker.run.scheduler is not None
    assert broker.run.scheduler.ledger.crashes(before[0].number) == 0


def test_three_failures_write_the_prompt_down(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    for failures in range(3):
        lease = next(lease for lease in generator.leases(0) if lease.number == 0)
        assert lease.failures == failures
        for sample in range(lease.samples):
            assert generator.deliver(generator.error(lease, sample, "reward failed: it raised")).status == "accepted"
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": 0, "reason": "reward failed: it raised"}
    assert broker.observer().status()["ledger"]["failed/quarantined"] == 1


def test_a_prompt_that_kills_generators_is_written_down_though_no_result_comes(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, num_rows=1, batch={"prompts": 1, "group_size": 2}, run={"steps": 0, "epochs": 1.0})
    broker.learner()
    for incarnation in range(5):
        assert len(broker.generator(incarnation=incarnation).leases(0)) == 1
    broker.generator(incarnation=5)
    broker.tick()
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": 0, "reason": "its generator crashed while it ran alone"}


def test_weights_and_files_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    assert generator.refused(FetchManifest(version=9)) == (
        "version: version 9 is not on the shelf any more; ask for the newest"
    )
    assert generator.refused(FetchChunk(digest="ab" * 32, index=0)) == (
        "chunk: snapshot abababababab is not to be had any more: it is not on the shelf; ask for the newest"
    )
    assert generator.refused(FetchFile(name="../keys/server.key", offset=0)) == (
        "file: ../keys/server.key is no file of the model"
    )


def test_a_snapshots_place_is_told_to_its_own_host_alone(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    near, far, unknown = (broker.generator(name) for name in ("near", "far", "unknown"))
    near.hello(host="here")
    far.hello(host="there")
    paths = [peer.ask(FetchManifest(version=0)).path for peer in (near, far, unknown)]  # type: ignore[union-attr]
    assert paths == ["/v0", "", ""]


def test_a_result_asks_again_for_those_who_wait_only_when_its_group_is_done(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    broker.learner()
    generator = broker.generator()
    lease, failing, broken = generator.leases(0)[:3]

    def changes(message: Result) -> bool:
        broker.service.changed = False
        generator.deliver(message)
        return broker.service.changed

    assert [changes(generator.result(lease, sample)) for sample in (0, 1, 1, 2)] == [False, False, False, True]
    assert [changes(generator.error(failing, sample, "no answer")) for sample in range(3)] == [False, False, True]
    assert changes(generator.result(broken, 9)), "a sample that was never asked for ends its lease"
    assert not changes(generator.result(lease, 0, epoch=1))


def test_a_result_that_makes_a_split_batch_ready_asks_again_for_the_learner(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, batch={"prompts": 1}, staleness={"max": 0, "at_bound": "split"})
    learner, generator = broker.learner(), broker.generator()
    lease = generator.leases(0)[0]
    generator.deliver(generator.result(lease, 0))
    assert isinstance(learner.take(0), Wait)
    broker.service.changed = False
    generator.deliver(generator.result(lease, 1))
    assert broker.service.changed
    assert learner.take(0).prompts.tolist() == [lease.number] * 2


def test_a_lease_can_be_handed_back_to_a_broker_that_knows_nothing(tmp_path: Path) -> None:
    """It was restarted since: nothing is leased, and nobody has to end for it."""
    release = Release(number=1, attempt=1, reason="the weights have moved on", failed=False)
    assert BrokerAlone(tmp_path).generator().ask(release) == Done()
