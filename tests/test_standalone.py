"""The standalone generator as a real process: joining a run, leaving it, dying in it, and being refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.engine import EngineDead
from actors.fake_engine import FakeEngine
from actors.stepped_engine import Draw, Running
from broker.service import Service
from launch.generator import generate, parse
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import Exit
from protocol.keys import make_run_keys
from protocol.shared_memory import folder_of
from tests.small_run import FakeGenerator, ScriptedLearner, broker, make_run
from tests.wire import wait_until

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "launch" / "generator.py"
IMPATIENT = "import sys, launch.generator as main; main.JOIN_S = 1.5; sys.exit(main.main(sys.argv[1:]))"
SLOW_REWARD = """import time
def score(completion, answer):
    time.sleep(0.02)
    return float(len(completion) % 3)
"""


def started(folder: Path, *arguments: str, program: tuple[str, ...] = (str(MAIN),)) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def joined(folder: Path, name: str) -> subprocess.Popen[str]:
    control = Addresses.read(folder).control
    key, reward = folder / "keys" / "generator.key", folder / "reward.py"
    return started(folder, "--connect", control, "--key", str(key), "--reward", f"{reward}:score", "--name", name)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def is_gone(pid: int) -> bool:
    """A zombie is gone: nobody but its new parent can remove its entry."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leases_of(service: Service, name: str) -> list[int]:
    """Prompts that this generator works on now."""
    scheduler = service._run.scheduler
    peers = [peer for peer in service._run.peers if peer.name == name]
    generators = scheduler.leases.generators if scheduler else {}
    return [
        lease.grant.prompt
        for peer in peers
        if peer.id in generators
        for lease in list(generators[peer.id].running.values())
    ]


def accepted_of(service: Service, name: str) -> float:
    return sum(peer.numbers.get("results_accepted", 0.0) for peer in service._run.peers if peer.name == name)


def slow_run(folder: Path, **sections: dict[str, Any]) -> Config:
    """A run whose rewards take their time, so that a generator can be met at work."""
    config = make_run(folder, **sections)
    (folder / "reward.py").write_text(SLOW_REWARD)
    return config


# --- Joining and leaving


def test_a_generator_joins_a_running_job_and_may_be_killed_in_it(tmp_path: Path) -> None:
    config = slow_run(tmp_path, run={"steps": 0, "epochs": 1.0}, watchdog={"heartbeat_s": 0.1, "lease_ttl_s": 1.0})
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config) as learner:
        with FakeGenerator(tmp_path, config, "early"):
            assert learner.step()
        with ended(joined(tmp_path, "guest")) as guest:
            wait_until(
                lambda: accepted_of(service, "guest") and leases_of(service, "guest"), "it is in the middle of work"
            )
            workers = [child.pid for child in psutil.Process(guest.pid).children(recursive=True)]
            assert workers, "its reward worker"
            os.kill(guest.pid, signal.SIGKILL)
            guest.wait(10)
        wait_until(lambda: all(is_gone(pid) for pid in workers), "its reward worker follows")
        with FakeGenerator(tmp_path, config, "late"):
            while learner.step():
                pass
        ledger = service.status(time.monotonic())["ledger"]
    assert learner.finished.kind == "complete"
    assert sorted(learner.prompts) == list(range(40))
    assert (ledger["trained"], ledger["failed"]) == (40, 0)


def test_a_generator_leaves_when_the_broker_ends_in_order(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 2})
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config) as learner:
        guest = joined(tmp_path, "guest")
        wait_until(lambda: accepted_of(service, "guest"), "it contributes")
        while learner.step():
            pass
    with ended(guest):
        assert guest.wait(10) == Exit.DONE
        _, said = guest.communicate(timeout=10)
    assert "the run is over: this generator leaves" in said


def test_a_generator_that_outlived_its_broker_goes_on_with_the_run_and_leaves_one_with_other_settings(
    tmp_path: Path,
) -> None:
    """Its engine is built, and it would sample as the old settings say."""

    def contributes(service: Service) -> None:
        wait_until(lambda: accepted_of(service, "guest"), "it contributes")
        service.farewells = list  # type: ignore[method-assign]  # as after a crash: it says nothing

    config = slow_run(tmp_path)
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config):
        guest = joined(tmp_path, "guest")
        contributes(service)
    with ended(guest):
        with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config):
            contributes(service)
        other = Config.model_validate(config.model_dump() | {"batch": {"prompts": 4, "group_size": 5}})
        with broker(tmp_path, other), ScriptedLearner(tmp_path, other):
            assert guest.wait(20) == Exit.REFUSED
        _, said = guest.communicate(timeout=10)
    assert "guest has other settings than the run" in said


def test_a_generator_that_is_asked_to_leave_hands_its_leases_back_and_is_soon_gone(tmp_path: Path) -> None:
    config = slow_run(tmp_path)
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config):
        with ended(joined(tmp_path, "guest")) as guest:
            held = wait_until(lambda: leases_of(service, "guest"), "it has leases")
            workers = [child.pid for child in psutil.Process(guest.pid).children(recursive=True)]
            asked_at = time.monotonic()
            guest.send_signal(signal.SIGTERM)
            assert guest.wait(10) == Exit.DONE
            assert time.monotonic() - asked_at < 3.0
            _, said = guest.communicate(timeout=10)
        scheduler = service._run.scheduler
        assert scheduler is not None
        assert leases_of(service, "guest") == []
        counted = {number: (scheduler.ledger.failures(number), scheduler.ledger.crashes(number)) for number in held}
        assert counted == dict.fromkeys(held, (0, 0))
        assert scheduler.ledger.counts()["leased"] == 0
    assert all(is_gone(pid) for pid in workers)
    assert not folder_of("generator-guest", guest.pid).exists()
    assert "Traceback" not in said


def test_a_generator_whose_engine_dies_says_no_goodbye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts that it ran may be why: to the broker it has crashed, which is counted."""

    class Mortal(FakeEngine):
        async def _step(self, requests: Sequence[Running]) -> list[Draw]:
            raise MemoryError("as a prompt can bring about")

    config = make_run(tmp_path, watchdog={"heartbeat_s": 0.1, "lease_ttl_s": 30.0})
    monkeypatch.setattr("actors.fake_engine.FakeEngine", Mortal)
    control, key, reward = Addresses.read(tmp_path).control, tmp_path / "keys" / "generator.key", tmp_path / "reward.py"
    args = parse(["--connect", control, "--key", str(key), "--reward", f"{reward}:score", "--name", "guest"])
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config):
        with pytest.raises(ExceptionGroup) as caught:
            asyncio.run(generate(args))
        assert caught.group_contains(EngineDead, match="a step failed: MemoryError")
        lost = leases_of(service, "guest")
        with FakeGenerator(tmp_path, config, "guest"):  # as its supervisor would start it again
            scheduler = service._run.scheduler
            assert scheduler is not None
            assert lost
            assert {scheduler.ledger.crashes(number) for number in lost} == {1}


# --- What ends it before it begins, with which words


@pytest.fixture(scope="module")
def waiting_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A broker that nobody has joined."""
    folder = tmp_path_factory.mktemp("run")
    config = make_run(folder)
    with broker(folder, config):
        yield folder


def outcome(folder: Path, *arguments: str, program: tuple[str, ...] = (str(MAIN),)) -> tuple[int, str]:
    """Exit code and the one line that it says."""
    with ended(started(folder, *arguments, program=program)) as process:
        _, said = process.communicate(timeout=30)
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return process.returncode, lines[0]


def arguments(run: Path, **other: str) -> list[str]:
    given = {
        "connect": Addresses.read(run).control,
        "key": str(run / "keys" / "generator.key"),
        "reward": f"{run / 'reward.py'}:score",
        "name": "guest",
    }
    return [part for name, value in (given | other).items() if value for part in (f"--{name}", value)]


def test_a_key_of_another_role_is_refused(waiting_run: Path) -> None:
    key = str(waiting_run / "keys" / "learner.key")
    code, said = outcome(waiting_run, *arguments(waiting_run, key=key))
    assert code == Exit.REFUSED
    assert said.endswith("role: the key is a learner's, the process says it is a generator")


def test_reward_code_that_the_run_does_not_use_is_refused(waiting_run: Path) -> None:
    code, said = outcome(waiting_run, *arguments(waiting_run, reward=""))
    assert code == Exit.REFUSED
    assert said.endswith(
        "guest would score with other reward code than the run, or another reward model; "
        "give it the same files with --reward and --reward-model"
    )


def test_reward_code_that_is_not_there_is_named(waiting_run: Path) -> None:
    code, said = outcome(waiting_run, *arguments(waiting_run, reward="/nowhere/reward.py:score"))
    assert code == Exit.SETTINGS
    assert "expected reward code in /nowhere/reward.py, no such file or directory; set rewards.functions" in said


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nowhere.key", "expected a key file, found none at nowhere.key"),
        ("reward.py", "expected a key file of Tether at reward.py, it is not JSON"),
        ("keys/server.key", "expected a tether-key-1 file with role, public, secret, server at keys/server.key"),
        ("keys", "expected a key file that this user can read at keys, but is a directory"),
    ],
)
def test_a_file_that_is_no_key_is_named(waiting_run: Path, key: str, words: str) -> None:
    code, said = outcome(waiting_run, *arguments(waiting_run, key=key))
    assert code == Exit.SETTINGS
    assert words in said


def test_an_address_that_is_none_is_named(waiting_run: Path) -> None:
    code, said = outcome(waiting_run, *arguments(waiting_run, connect="localhost:5555"))
    assert code == Exit.SETTINGS
    assert "expected tcp://HOST:PORT with a port below 65535, got localhost:5555" in said


def test_the_key_of_another_run_ends_with_a_question_about_it(waiting_run: Path, tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    key = str(tmp_path / "keys" / "generator.key")
    code, said = outcome(waiting_run, *arguments(waiting_run, key=key), program=("-c", IMPATIENT))
    assert code == Exit.ORPHAN
    assert "waited 2 s for the broker's welcome from the broker at tcp://127.0.0.1:" in said
    assert said.endswith("does the run go on at this address, and is the key file from it?")


def test_a_broker_that_is_not_there_ends_likewise(waiting_run: Path) -> None:
    code, said = outcome(waiting_run, *arguments(waiting_run, connect="tcp://127.0.0.1:9"), program=("-c", IMPATIENT))
    assert code == Exit.ORPHAN
    assert "no answer came; does the run go on at this address" in said


def test_without_a_key_it_says_where_to_get_one(tmp_path: Path) -> None:
    with ended(started(tmp_path, "--connect", "tcp://127.0.0.1:9")) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == Exit.SETTINGS
    assert "--connect needs --key FILE: copy RUN/keys/generator.key from the host of the run" in said.splitlines()[-1]


def test_help_answers_without_loading_what_computes(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'vllm', 'transformers', 'tokenizers', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(MAIN)], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stderr
    assert "joins a running job" in result.stdout
