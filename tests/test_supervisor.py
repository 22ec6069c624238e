"""The supervisor with real little processes: what is restarted, what ends a run, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.plan import Plan, Process, ProcessRole
from launch.supervisor import Phase, Supervisor, Verdict
from protocol.errors import Exit

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_S = 10.0

STAY = "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); print('up'); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up')\nwhile True: signal.pause()"
FAIL = "raise ValueError('the first error')"
WATCH_PARENT = """
import os, signal
from protocol.parent import leave_with_parent
leave_with_parent(os.environ)
print('up')
signal.pause()
"""


def leave_with(code: int) -> str:
    return f"import sys; sys.exit({code})"


def die_once(marker: Path, then: str) -> str:
    """Fails at its first start, and is `then` at its second."""
    path = repr(str(marker))
    return f"import os, sys\nif not os.path.exists({path}):\n open({path}, 'w').close(); sys.exit(9)\n{then}"


def process(name: str, role: ProcessRole, code: str) -> Process:
    env = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY)}
    return Process(name, role, (sys.executable, "-c", code), env, "cpu")


def cluster(broker: str = STAY, learners: tuple[str, ...] = (STAY,), generators: tuple[str, ...] = (STAY,)) -> Plan:
    return Plan(
        (
            process("broker", ProcessRole.BROKER, broker),
            *(process(f"learner-{i}", ProcessRole.LEARNER, code) for i, code in enumerate(learners)),
            *(process(f"generator-{i}", ProcessRole.GENERATOR, code) for i, code in enumerate(generators)),
        ),
        (),
    )


class Run:
    """A started supervisor, what it told, and its verdict."""

    def __init__(self, plan: Plan, folder: Path, *, restarts: int, drain_s: float) -> None:
        self.told: list[str] = []
        self.drained = 0
        self.folder = folder
        self.supervisor = Supervisor(plan, folder, os.environ, drain_s, restarts, self._drain, self.told.append)
        self.supervisor.start()

    def _drain(self) -> None:
        self.drained += 1

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not happened():
            assert time.monotonic() < deadline, f"waited {DEADLINE_S} s; told: {self.told}"
            assert self.supervisor.tick() is None, "ended too early"

    def verdict(self) -> Verdict:
        deadline = time.monotonic() + DEADLINE_S
        while (verdict := self.supervisor.tick()) is None:
            assert time.monotonic() < deadline, f"no verdict in {DEADLINE_S} s; told: {self.told}"
        return verdict

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def everybody_is_up(self) -> bool:
        return all("up" in self.log(seen.name) for seen in self.supervisor.processes())

    def restarts(self, name: str) -> int:
        return next(seen.restarts for seen in self.supervisor.processes() if seen.name == name)


Start = Callable[..., Run]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def start(plan: Plan, *, restarts: int = 5, drain_s: float = 20.0) -> Run:
        runs.append(Run(plan, tmp_path / "logs", restarts=restarts, drain_s=drain_s))
        return runs[-1]

    yield start
    for run in runs:
        run.supervisor.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not left, f"left behind: {left}"


def test_a_learner_that_ends_well_ends_the_run_and_the_others_leave(started: Start) -> None:
    verdict = started(cluster(learners=(leave_with(0), leave_with(0)))).verdict()
    assert verdict == Verdict(Exit.DONE, "the run is complete")


def test_the_broker_leaves_after_the_others(started: Start, tmp_path: Path) -> None:
    note = str(tmp_path / "order")
    write = "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: (open({0!r}, 'a').write({1!r}), sys.exit(0)))"
    stay = write + "; print('up'); signal.pause()"
    done = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    run = started(cluster(stay.format(note, "broker "), (f"print('up')\n{done}",), (stay.format(note, "generator "),)))
    run.until(run.everybody_is_up)
    (tmp_path / "go").touch()
    assert run.verdict().code == Exit.DONE
    assert Path(note).read_text() == "generator broker "


def test_a_dead_generator_is_restarted_while_the_others_stay(started: Start, tmp_path: Path) -> None:
    run = started(cluster(generators=(die_once(tmp_path / "marker", STAY), STAY)))
    run.until(run.everybody_is_up)
    assert run.restarts("generator-0") == 1
    assert run.restarts("learner-0") == run.restarts("broker") == run.restarts("generator-1") == 0
    assert "generator-0 ended with code 9" in run.told[0]
    assert "restart 1 of 5 in 0.5 s" in run.told[0]


def test_a_generator_beyond_its_budget_is_given_up_and_the_other_goes_on(started: Start) -> None:
    run = started(cluster(generators=(FAIL, STAY)), restarts=1)
    run.until(lambda: len(run.told) == 2)
    assert "going on without it" in run.told[1]
    assert [s.state for s in run.supervisor.processes() if s.role is ProcessRole.GENERATOR] == ["given up", "running"]


def test_the_last_generator_beyond_its_budget_ends_the_run_with_its_first_error(started: Start) -> None:
    verdict = started(cluster(generators=(FAIL,)), restarts=0).verdict()
    assert verdict.code == 1
    assert "generator-0 ended with code 1: ValueError: the first error" in verdict.text
    assert "generator-0.log" in verdict.text


def test_who_was_killed_is_not_blamed_for_its_last_words(started: Start) -> None:
    suicide = "import os, signal; print('all is well', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    verdict = started(cluster(generators=(suicide,)), restarts=0).verdict()
    assert verdict.text.startswith("generator-0 was killed by SIGKILL (out of memory?) (log: ")


def test_a_wrong_setting_is_not_tried_again(started: Start) -> None:
    verdict = started(cluster(broker=f"print('error: no column question'); {leave_with(Exit.SETTINGS)}")).verdict()
    assert verdict.code == Exit.SETTINGS
    assert "broker ended with code 2 (settings): error: no column question" in verdict.text


def test_a_dead_broker_is_restarted_and_the_learner_is_left_alone(started: Start, tmp_path: Path) -> None:
    run = started(cluster(broker=die_once(tmp_path / "marker", STAY)))
    run.until(run.everybody_is_up)
    assert (run.restarts("broker"), run.restarts("learner-0")) == (1, 0)


def test_one_dead_rank_takes_its_group_down_and_all_ranks_come_back_with_resume(started: Start, tmp_path: Path) -> None:
    report = "import sys; print('arguments', sys.argv[1:])\n" + STAY
    run = started(cluster(learners=(report, die_once(tmp_path / "marker", report))))
    run.until(lambda: all("arguments ['--resume']" in run.log(f"learner-{rank}") for rank in (0, 1)))
    assert run.restarts("learner-0") == 1
    assert run.restarts("generator-0") == 0


def test_a_learner_that_keeps_dying_ends_the_run(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.supervisor.RESTARTS", 1)
    run = started(cluster(learners=(FAIL,)))
    verdict = run.verdict()
    assert verdict.code == 1
    assert "ValueError: the first error" in verdict.text
    assert len(run.told) == 1


def test_what_left_its_session_is_found_and_killed(started: Start, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    escape = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
        f"open({str(note)!r}, 'w').write(str(child.pid)); sys.exit(9)"
    )
    run = started(cluster(generators=(escape, STAY)), restarts=0)
    run.until(lambda: any("going on without it" in line for line in run.told))
    assert not psutil.pid_exists(int(note.read_text()))


def test_the_first_interrupt_drains_and_the_learner_ends_by_itself(started: Start, tmp_path: Path) -> None:
    note = tmp_path / "drained"
    obedient = f"import os, sys\nprint('up')\nwhile not os.path.exists({str(note)!r}): pass\nsys.exit(130)"
    run = started(cluster(learners=(obedient,)))
    run.until(run.everybody_is_up)
    run.supervisor.interrupt()
    run.until(lambda: run.supervisor.phase is Phase.DRAINING)
    note.touch()
    assert run.verdict() == Verdict(Exit.INTERRUPTED, "interrupted: the run ended in order and can be resumed")
    assert run.drained == 1


def test_a_learner_that_does_not_drain_is_terminated_at_the_deadline(started: Start) -> None:
    run = started(cluster(), drain_s=0.3)
    run.until(run.everybody_is_up)
    run.supervisor.interrupt()
    verdict = run.verdict()
    assert verdict.code == Exit.INTERRUPTED
    assert "did not end within" in verdict.text


def test_the_second_interrupt_leaves_nothing_within_two_seconds(started: Start) -> None:
    run = started(cluster(STUBBORN, (STUBBORN, STUBBORN), (STUBBORN, STUBBORN)))
    run.until(run.everybody_is_up)
    run.supervisor.interrupt()
    run.until(lambda: run.supervisor.phase is Phase.DRAINING)
    run.supervisor.interrupt()
    started_at = time.monotonic()
    assert run.verdict() == Verdict(Exit.INTERRUPTED, "interrupted at once")
    assert time.monotonic() - started_at < 2.0


def test_children_leave_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    driver = (
        "import os, pathlib, time\n"
        "from tests.test_supervisor import Run, cluster, WATCH_PARENT\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "run = Run(cluster(WATCH_PARENT, (WATCH_PARENT,), (WATCH_PARENT,)), folder, restarts=0, drain_s=1)\n"
        "run.until(run.everybody_is_up)\n"
        "print(*[child.popen.pid for unit in run.supervisor._units for child in unit.children], flush=True)\n"
        "time.sleep(60)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", driver], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    children = [psutil.Process(int(pid)) for pid in killed.stdout.readline().split()]
    assert len(children) == 3
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    _, left = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not left
