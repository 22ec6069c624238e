"""The broker as a real process: killed in the middle of a run and started again, it is told everything anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest
import yaml

from learner.link import Taken
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import Exit
from tests.small_run import FakeGenerator, ScriptedLearner, make_run
from tests.wire import SmallService, serving

ROOT = Path(__file__).resolve().parents[1]


def start(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch" / "broker.py"), "--run-dir", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@contextmanager
def broker_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(folder)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def run_on_disk(folder: Path) -> Config:
    config = make_run(folder, run={"steps": 0, "epochs": 1.0})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config


def test_a_broker_that_is_killed_and_started_again_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a step is in training and again while the learner waits for a batch."""
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.5)  # what was lost is asked again sooner than in life
    config = run_on_disk(tmp_path)
    with (
        broker_process(tmp_path) as first,
        ScriptedLearner(tmp_path, config) as learner,
        FakeGenerator(tmp_path, config),
    ):
        for _ in range(3):
            assert learner.step()
        taken = learner.link.take(learner.version, lambda: None)
        assert isinstance(taken, Taken)
        kill(first)
        with broker_process(tmp_path) as second:
            learner.finish(taken)
            for _ in range(2):
                assert learner.step()
            kill(second)
            with broker_process(tmp_path) as third:
                while learner.step():
                    pass
                third.send_signal(signal.SIGTERM)
                assert third.wait(10) == Exit.DONE
    assert learner.finished.kind == "complete"
    assert sorted(learner.prompts) == list(range(40))
    books = msgpack.unpackb(learner.trained[-1].ledger)
    assert (books["trained"], books["failed"], books["filtered"]) == (40, {}, {})


def test_a_broker_whose_port_is_taken_says_so_in_one_line(tmp_path: Path) -> None:
    run_on_disk(tmp_path)
    taken = Addresses.read(tmp_path)
    with serving(tmp_path, SmallService(lambda *_: None), taken), broker_process(tmp_path) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == Exit.RUN_LOCKED
    assert len(said.splitlines()) == 1, said
    assert f"the broker needs {taken.control}, but address already in use; end the process that holds the port" in said
