"""The broker as a real process: killed in the middle of a run and started again, it is told everything anew."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from learner.link import Taken
from protocol.addresses import Addresses
from protocol.errors import Exit
from tests.broker_process import BrokerProcess, run_on_disk
from tests.small_run import FakeGenerator, ScriptedLearner
from tests.wire import SmallService, serving


def test_a_broker_that_is_killed_and_started_again_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a step is in training and again while the learner waits for a batch."""
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.5)  # what was lost is asked again sooner than in life
    config = run_on_disk(tmp_path, run={"steps": 0, "epochs": 1.0})
    with (
        BrokerProcess(tmp_path) as first,
        ScriptedLearner(tmp_path, config) as learner,
        FakeGenerator(tmp_path, config),
    ):
        for _ in range(3):
            assert learner.step()
        taken = learner.link.take(learner.version, lambda: None)
        assert isinstance(taken, Taken)
        first.kill()
        with BrokerProcess(tmp_path) as second:
            learner.finish(taken)
            for _ in range(2):
                assert learner.step()
            second.kill()
            with BrokerProcess(tmp_path) as third:
                while learner.step():
                    pass
                assert third.stop() == Exit.DONE
    assert learner.finished.kind == "complete"
    assert sorted(learner.prompts) == list(range(40))
    books = msgpack.unpackb(learner.trained[-1].ledger)
    assert (books["trained"], books["failed"], books["filtered"]) == (40, {}, {})


def test_a_broker_whose_port_is_taken_says_so_in_one_line(tmp_path: Path) -> None:
    run_on_disk(tmp_path)
    taken = Addresses.read(tmp_path)
    with serving(tmp_path, SmallService(lambda *_: None), taken), BrokerProcess(tmp_path) as process:
        assert process.wait() == Exit.RUN_LOCKED
    said = process.log
    assert len(said.splitlines()) == 1, said
    assert f"the broker needs {taken.control}, but address already in use; end the process that holds the port" in said
