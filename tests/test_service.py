"""Sessions, keys and roles, how a run ends, and what its status shows: the broker's service without sockets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.errors import ConfigError, ProtocolError
from protocol.messages import (
    Beat,
    Done,
    Drain,
    Evaluate,
    Finished,
    Leases,
    Pull,
    Role,
    StatusRequest,
    Wait,
)
from tests.broker_alone import BrokerAlone, Peer, manifest


def test_a_key_of_another_role_is_refused(tmp_path: Path) -> None:
    impostor = Peer(BrokerAlone(tmp_path), Role.GENERATOR, "generator-0")
    said = impostor.refused_hello(role="learner")
    assert said == "role: the key is a generator's, the process says it is a learner"


def test_other_settings_are_refused_with_both_digests(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner = Peer(broker, Role.LEARNER, "learner-0")
    assert learner.refused_hello(settings_digest="0123456789") == (
        "settings: learner-0 has other settings than the run (digest 01234567, expected "
        f"{broker.config.result_digest()[:8]}); start it again, with the run's settings"
    )
    learner.hello(settings_digest=broker.config.result_digest())


def test_other_reward_code_is_refused(tmp_path: Path) -> None:
    generator = Peer(BrokerAlone(tmp_path), Role.GENERATOR, "far")
    said = (
        "rewards: far would score with other reward code than the run, or another reward model; give it the same files "
        "with --reward and --reward-model"
    )
    assert generator.refused_hello(reward_digest="") == said
    assert generator.refused_hello(reward_digest="f" * 32) == said


def test_a_critic_that_would_learn_alone_to_the_end_of_the_rows_is_refused_by_who_counts_them(tmp_path: Path) -> None:
    sections = {"algorithm": {"advantage": "gae"}, "run": {"steps": 0, "epochs": 2}}
    BrokerAlone(tmp_path / "less", **sections, critic={"warmup_steps": 19})
    with pytest.raises(ConfigError, match=r"never trained, got 20 and 20, which is 2 x 40 rows in batches of 4; set"):
        BrokerAlone(tmp_path / "all", **sections, critic={"warmup_steps": 20})
    BrokerAlone(tmp_path / "none", critic={"warmup_steps": 20}, run=sections["run"])


def test_a_critic_that_knows_fewer_tokens_than_the_policy_is_refused(tmp_path: Path) -> None:
    for size in (3, 1000):
        (tmp_path / f"critic-{size}").mkdir()
        (tmp_path / f"critic-{size}" / "config.json").write_text(json.dumps({"vocab_size": size}))
    gae = {"advantage": "gae"}
    BrokerAlone(tmp_path / "more", algorithm=gae, critic={"path": str(tmp_path / "critic-1000")})
    with pytest.raises(
        ConfigError, match=r"critic.path must be a model that reads .* with 3; take a model of the same"
    ):
        BrokerAlone(tmp_path / "fewer", algorithm=gae, critic={"path": str(tmp_path / "critic-3")})
    with pytest.raises(ConfigError, match=r"expected critic.path to be a folder or a Hugging Face name"):
        BrokerAlone(tmp_path / "none", algorithm=gae, critic={"path": str(tmp_path / "no-such")})


def test_a_welcome_brings_what_a_stranger_needs(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    welcome = Peer(broker, Role.GENERATOR, "far").hello()
    assert {name for name, _, _ in welcome.files} == {"config.json", "tokenizer.json"}
    assert welcome.settings == broker.config.model_dump(mode="json")
    assert welcome.num_steps == 8
    assert broker.observer().hello().files == []


def test_a_session_is_nobody_elses(tmp_path: Path) -> None:
    generator = BrokerAlone(tmp_path).generator()
    assert generator.refused(Beat(state="x"), key="stolen") == "identity: this session belongs to another key"


def test_an_old_epoch_is_over(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    generator = broker.generator()
    broker.learner()
    assert generator.refused(Beat(state="x")) == "session: this session is over; say hello again"
    generator.hello()
    generator.beat()


def test_ten_thousand_sessions_that_never_were_leave_nothing_behind(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    generator = broker.generator()
    for session in range(1, 10_001):
        generator.session = session
        with pytest.raises(ProtocolError, match="say hello again"):
            generator.ask(Pull(version=0, digest="", room=1))
    assert len(broker.run.peers) == 1


def test_more_processes_than_anybody_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.service.MAX_PEERS", 3)
    broker = BrokerAlone(tmp_path)
    for number in range(3):
        broker.generator(f"generator-{number}")
    assert Peer(broker, Role.GENERATOR, "more").refused_hello().startswith("full: 3 processes are connected")
    broker.generator("generator-1", incarnation=2)  # takes a place, needs none


def test_of_two_processes_with_one_name_the_older_is_told_to_choose_another(tmp_path: Path) -> None:
    """Let in again, the two would take each other's leases for ever, each loss a crash of its prompt."""
    broker = BrokerAlone(tmp_path)
    older = broker.generator("box", incarnation=1)
    newer = broker.generator("box", incarnation=2)
    assert older.refused(Beat(state="x")).startswith("session: ")
    assert older.refused_hello() == (
        "replaced: another process called box has taken this one's place; give each its own --name"
    )
    newer.hello()
    newer.beat()


def test_a_name_and_its_role_are_one(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    generator = broker.generator("box")
    broker.peer(Role.STATUS, "box", incarnation=5)
    generator.beat()


def test_two_observers_of_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    first, second = (broker.peer(Role.STATUS, "status", incarnation=number) for number in (1, 2))
    assert first.status()["run_id"] == second.status()["run_id"] == "test"


def test_who_is_silent_is_forgotten(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    generator, observer = broker.generator(), broker.observer()
    broker.wait(broker.config.watchdog.lease_ttl_s + 1, generator)
    assert [peer.name for peer in broker.run.peers] == ["generator-0"]
    assert observer.refused(StatusRequest()).startswith("session: ")


# --- Ends


def test_a_run_that_is_asked_to_drain_ends_drained_and_gives_no_more_leases(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    leases = generator.leases(0)
    assert isinstance(broker.observer().ask(Drain(reason="Ctrl-C")), Done)
    assert generator.pull(0) == Wait(reason="the run ends", version=0, digest=manifest(0).digest)
    assert broker.observer().status()["phase"] == "draining"
    assert generator.deliver(generator.result(leases[0], 0)).status == "accepted"
    assert learner.take(0) == Finished(kind="drained", reason="Ctrl-C")


def test_a_batch_that_was_cut_is_trained_to_its_end_in_a_drain(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    first = learner.take(0)
    broker.observer().ask(Drain())
    assert learner.take(0) is first
    learner.publish(1)
    learner.advance(1)
    assert learner.take(1) == Finished(kind="drained", reason="asked to")


def test_a_run_that_is_done_says_so(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, run={"steps": 2})
    learner, generator = broker.learner(), broker.generator()
    for step in range(2):
        answer = generator.pull(step)
        for lease in answer.leases if isinstance(answer, Leases) else ():
            generator.answer(lease)
        learner.train(step)
    assert learner.take(2) == Finished(kind="complete")
    assert broker.observer().status()["phase"] == "done"


def test_no_progress_is_written_down_and_then_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker = BrokerAlone(tmp_path, watchdog={"warn_s": 20.0, "stop_s": 100.0, "lease_ttl_s": 3.0})
    learner, generator = broker.learner(), broker.generator()
    generator.leases(0)
    broker.wait(19, learner)
    assert "no progress" not in caplog.text
    broker.wait(2, learner)
    (warning,) = [record for record in caplog.records if "no progress" in record.message]
    assert warning.message.startswith("no progress for 21 s: ")
    table = json.loads(warning.message.partition(": ")[2])
    assert [peer["name"] for peer in table["peers"]] == ["learner-0"]
    assert table["leases"]["learner_waits_for"] == "0 of 4 groups finished, 0 open"
    broker.wait(78, learner)
    assert isinstance(learner.take(0), Wait)
    broker.wait(2, learner)
    finished = learner.take(0)
    assert isinstance(finished, Finished)
    assert finished.kind == "verdict"
    assert finished.reason.startswith("no progress for 101 s (watchdog.stop_s); learner-0: at work")
    assert broker.observer().status()["verdict"] == finished.reason
    assert generator.hello()
    assert generator.pull(0).reason == "the run ends"  # type: ignore[union-attr]


def test_a_verdict_is_sent_however_long_it_is(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, watchdog={"stop_s": 10.0, "lease_ttl_s": 30.0})
    learner = broker.learner()
    talkers = [broker.generator(f"generator-{number}") for number in range(4)]
    for talker in talkers:
        talker.beat(detail="x" * 4000)
    broker.now += 11
    broker.tick()
    assert learner.take(0).kind == "verdict"


def test_a_long_warm_start_is_no_lack_of_progress(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, watchdog={"warn_s": 10.0, "stop_s": 50.0})
    learner = broker.peer(Role.LEARNER, "learner-0")
    broker.wait(500, learner, every_s=2.0)
    learner.publish(0)
    broker.wait(49, learner)
    assert isinstance(learner.take(0), Wait)
    broker.wait(2, learner)
    assert learner.take(0).kind == "verdict"


# --- Status


def test_the_status_can_be_sent_in_every_phase(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, evaluation={"every": 1}, run={"steps": 2})
    observer = broker.observer()
    assert observer.status()["phase"] == "waiting for the learner"
    learner, generator = broker.learner(), broker.generator()
    observer.hello()
    assert observer.status()["phase"] == "running"
    learner.ask(Evaluate(version=0))
    leases = generator.leases(0)
    generator.beat(numbers={"kv_usage": float("nan")}, leases=[(each.number, each.attempt, 3) for each in leases])
    assert observer.status()["evaluating"]
    for lease in leases:
        generator.answer(lease)
    learner.take(0)
    assert observer.status()["training_step"] == 0
    learner.train(0)
    learner.train(1)
    broker.tick()
    assert observer.status()["evaluating"], "nobody asked for the last evaluation, so the broker did"
    generator.evaluate(2)
    status = observer.status()
    assert (status["phase"], status["version"], status["ledger"]["trained"]) == ("done", 2, 8)
    assert [evaluation["version"] for evaluation in status["evaluations"]] == [0, 2]
    assert [process["name"] for process in status["processes"]] == ["generator-0", "learner-0"]


def test_a_learner_that_contradicts_itself_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    alone = BrokerAlone(tmp_path)
    learner = alone.learner()
    epoch = alone.service.epoch
    said = learner.refused_hello(incarnation=2, version=2, training_step=1, num_ranks=3)
    assert said == "order: step 1 cannot be in training at version 2"
    assert (alone.service.epoch, alone.run.num_ranks) == (epoch, 1)
