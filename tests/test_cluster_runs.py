"""Whole runs through `launch/cluster.py`, with real processes: what they leave behind, and what survives which death.

One start costs ten seconds of imports, so a run serves as many tests as it can.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from protocol.addresses import Addresses
from protocol.errors import Exit
from protocol.shared_memory import folder_of
from tests.cluster_process import NUM_ROWS, ClusterProcess, flags, ledger_of, lines_of, make_task, steps_of

BOUND = 2
NUM_STEPS = 14
SETTLED_OR_OPEN = ("queued", "leased", "finished", "trained", "filtered", "failed")

pytestmark = pytest.mark.timeout(240)


class Finished(NamedTuple):
    """A run that was drained by one Ctrl-C, left at once by two, and then finished."""

    run_dir: Path
    drained: str  # what the first start said
    drained_at: int  # steps that it had made
    left: str
    left_within_s: float  # of the second Ctrl-C
    survivors: list[psutil.Process]  # of that
    meanwhile: str  # what another start in the same folder said
    said: str


class Survived(NamedTuple):
    """A run that is over although some of its processes were killed."""

    run_dir: Path
    said: str
    addresses: Addresses  # before the broker was killed
    status: dict[str, Any]  # status.json as it was then


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


# --- A run from start to end, interrupted twice -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three starts; the later two from another folder."""
    wanted = {"run-name": "finished", "data.max_rows": NUM_STEPS * 4, "evaluation.every": 7, "checkpoint.every": 2}
    run_dir, elsewhere = task / "runs" / "finished", tmp_path_factory.mktemp("elsewhere")
    with ClusterProcess(task, *flags(**wanted)) as first:
        first.until_step(run_dir, 2)
        first.interrupt()
        assert first.end() == Exit.INTERRUPTED, first.said
    drained_at = len(steps_of(run_dir))
    resume = shlex.split(first.said.splitlines()[-1])[3:]

    with ClusterProcess(elsewhere, *resume) as second:
        second.until_step(run_dir, drained_at + 2)
        with ClusterProcess(task, *flags(**{"run-name": "finished"})) as meanwhile:
            assert meanwhile.end() == Exit.RUN_LOCKED
        tree = second.tree()
        second.interrupt()
        second.until(lambda: "Ctrl-C again leaves at once" in second.said, "the answer to Ctrl-C")
        second.interrupt()
        started = time.monotonic()
        assert second.end() == Exit.INTERRUPTED, second.said
        took_s = time.monotonic() - started
        survivors = [process for process in tree if process.is_running()]

    with ClusterProcess(elsewhere, *resume) as third:
        assert third.end() == Exit.DONE, third.said
    return Finished(run_dir, first.said, drained_at, second.said, took_s, survivors, meanwhile.said, third.said)


def test_the_first_ctrl_c_ends_in_order_and_leaves_a_checkpoint(finished: Finished) -> None:
    assert "ending in order within 60 s" in finished.drained
    assert finished.drained.splitlines()[-1] == f"resume: python launch/cluster.py --resume {finished.run_dir}"
    checkpoint = finished.run_dir / "checkpoints" / f"step_{finished.drained_at}"
    log = (finished.run_dir / "logs" / "learner-0.log").read_text()
    assert f"checkpoint of version {finished.drained_at} in" in log
    assert str(checkpoint) in log
    assert f"resuming from the checkpoint of version {finished.drained_at}" in log


def test_which_columns_the_run_reads_is_said_at_every_start(finished: Finished, task: Path) -> None:
    said = rf"training: \d+ rows from {task / 'data'}: prompt <- question, answer <- answer \(GSM8K's columns\)"
    assert [len(re.findall(said, text)) for text in (finished.drained, finished.left, finished.said)] == [1, 1, 1]


def test_the_second_ctrl_c_leaves_within_two_seconds_and_nothing_behind(finished: Finished) -> None:
    assert finished.left_within_s < 2.0
    assert not finished.survivors
    assert "stopped: interrupted" in finished.left


def test_a_folder_in_use_is_refused(finished: Finished) -> None:
    assert finished.meanwhile.startswith(f"error: {finished.run_dir} is used by a run that goes on (process ")


def test_a_finished_run_leaves_every_file_and_says_what_came_of_it(finished: Finished) -> None:
    run_dir = finished.run_dir
    expected = {"config.yaml", "metrics.jsonl", "tensorboard", "logs", "samples", "evaluations.jsonl", "checkpoints"}
    assert expected | {"curves.png", "status.json", "command.txt"} <= {path.name for path in run_dir.iterdir()}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (run_dir / "logs").iterdir()} == {"broker", "learner-0", "generator-0"}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {f"step_{NUM_STEPS}", f"step_{NUM_STEPS - 2}"}
    before, middle, last = sorted(row["version"] for row in lines_of(run_dir / "evaluations.jsonl"))
    assert (before, last) == (0, 14)
    assert 7 <= middle < 14, "later than 7 where its generator was too slow to hold that version"
    samples = [lines_of(path) for path in sorted((run_dir / "samples").iterdir())]
    assert [{sample["step"] for sample in step} for step in samples] == [{step} for step in range(NUM_STEPS)]
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in finished.said
    assert finished.said.splitlines()[-1] == f"done: the run is complete ({run_dir})"
    assert "Traceback" not in finished.said


def test_each_step_is_one_line_of_finite_curves_that_add_up(finished: Finished) -> None:
    rows = steps_of(finished.run_dir)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    for row in rows:
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
        assert row["staleness/max"] <= BOUND
        ledger = ledger_of(row)
        assert ledger["offered"] == sum(ledger[name] for name in SETTLED_OR_OPEN)
        assert sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(1.0)
    assert [ledger_of(row)["trained"] for row in rows] == [4 * (step + 1) for step in range(NUM_STEPS)]


def test_tensorboard_holds_the_curves_of_the_file(finished: Finished) -> None:
    board = EventAccumulator(str(finished.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    shown = {(name, event.step): event.value for name in board.Tags()["scalars"] for event in board.Scalars(name)}
    rows = lines_of(finished.run_dir / "metrics.jsonl")
    written = {(name, row["step"]): row[name] for row in rows for name in row if name not in ("step", "time")}
    assert shown == pytest.approx(written, rel=1e-6)


@torch.no_grad()
def test_a_checkpoint_holds_a_model_that_transformers_loads(finished: Finished, task: Path) -> None:
    folder = finished.run_dir / "checkpoints" / f"step_{NUM_STEPS}" / "hf"
    trained, first = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, task / "model"))
    ids = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode("w5 w6 w7").ids])
    before, after = (model(ids).logits.log_softmax(-1) for model in (first, trained))
    assert torch.isfinite(after).all()
    assert 1e-4 < (after - before).abs().max() < 1.0


def test_status_json_keeps_how_the_run_ended(finished: Finished) -> None:
    status = json.loads((finished.run_dir / "status.json").read_text())
    assert status["ended"] == {"code": 0, "text": "the run is complete"}
    assert [process["name"] for process in status["processes"]] == ["broker", "learner-0", "generator-0"]
    assert status["broker"]["num_steps"] == NUM_STEPS


# --- Deaths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survived(task: Path) -> Survived:
    """Two ranks and two generators; a generator, the broker and a rank are killed, one after the other."""
    wanted = {"run-name": "survived", "learner-gpus": 2, "generators": 2, "checkpoint.every": 4}
    run_dir = task / "runs" / "survived"
    with ClusterProcess(task, *flags(**wanted, **{"run.samples_per_step": 100})) as run:

        def kill(name: str) -> None:
            run.process(name).kill()
            run.until(lambda: f"{name} was killed by SIGKILL" in run.said, f"word of the death of {name}")

        run.until_step(run_dir, 1)
        kill("generator-0")
        run.until_step(run_dir, 3)
        addresses = Addresses.read(run_dir)
        status = json.loads((run_dir / "status.json").read_text())
        kill("broker")
        run.until_step(run_dir, 9)
        kill("learner-1")
        assert run.end() == Exit.DONE, run.said
    return Survived(run_dir, run.said, addresses, status)


def test_whoever_was_killed_is_restarted_and_nobody_else(survived: Survived) -> None:
    assert re.search(r"generator-0 was killed by SIGKILL .*restart 1 of 5 in 0.5 s", survived.said)
    assert re.search(r"broker was killed by SIGKILL .*restart 1 of 3 in 0.5 s", survived.said)
    assert re.search(r"learner-1 was killed by SIGKILL .*restart 1 of 3 in 0.5 s", survived.said)
    processes = json.loads((survived.run_dir / "status.json").read_text())["processes"]
    restarts = {process["name"]: process["restarts"] for process in processes}
    assert restarts == {"broker": 1, "learner-0": 1, "learner-1": 1, "generator-0": 1, "generator-1": 0}
    assert Addresses.read(survived.run_dir) == survived.addresses


def test_every_prompt_is_trained_once_whoever_dies(survived: Survived) -> None:
    rows = steps_of(survived.run_dir)
    assert [row["step"] for row in rows] == list(range(NUM_ROWS // 4))
    assert [ledger_of(row)["trained"] for row in rows] == [4 * (step + 1) for step in range(NUM_ROWS // 4)]
    assert all(row["staleness/max"] <= BOUND for row in rows)
    steps_of_prompt: dict[int, set[int]] = {}
    for path in (survived.run_dir / "samples").iterdir():  # rank 0's completions: at least one of most prompts
        for sample in lines_of(path):
            steps_of_prompt.setdefault(sample["prompt_number"], set()).add(sample["step"])
    assert len(steps_of_prompt) > NUM_ROWS // 2
    assert all(len(steps) == 1 for steps in steps_of_prompt.values())


def test_a_group_of_ranks_goes_on_from_its_newest_checkpoint(survived: Survived) -> None:
    assert "resuming from the checkpoint of version 8" in (survived.run_dir / "logs" / "learner-0.log").read_text()


def test_status_json_is_kept_up_to_date_while_a_run_goes_on(survived: Survived) -> None:
    assert survived.status["ended"] is None
    assert survived.status["broker"]["phase"] == "running"
    assert {process["state"] for process in survived.status["processes"]} >= {"running"}


# --- vLLM, and the death of the supervisor ----------------------------------------------------------------------------


class Orphaned(NamedTuple):
    """A run with vLLM whose supervisor was killed after some steps."""

    run_dir: Path
    tree: list[psutil.Process]  # all that ran below the supervisor
    survivors: list[psutil.Process]  # of it, 3 s later
    memory: list[Path]  # folders in shared memory of its processes


def num_mixed(run_dir: Path) -> int:
    """Trained completions that several versions have written."""
    samples = [sample for path in (run_dir / "samples").glob("*.jsonl") for sample in lines_of(path)]
    return sum(len(sample["versions"]) > 1 for sample in samples)


@pytest.fixture(scope="module")
def orphaned(task: Path) -> Orphaned:
    wanted = {"run-name": "vllm", "generators.engine": "vllm", "zero": 1, "steps": 500, "sampling.max_tokens": 250}
    run_dir = task / "runs" / "vllm"
    with ClusterProcess(task, *flags(**wanted, **{"run.samples_per_step": 100})) as run:
        run.until_step(run_dir, 5)
        run.until(lambda: num_mixed(run_dir), "a completion whose weights changed in mid-sentence")
        tree = run.tree()
        folders = [folder_of("learner", p.pid) for p in tree] + [
            folder_of("generator-generator-0", p.pid) for p in tree
        ]
        memory = [folder for folder in folders if folder.is_dir()]
        run.kill()
        _, survivors = psutil.wait_procs(tree, timeout=3.0)
        for process in survivors:
            process.kill()
    return Orphaned(run_dir, tree, survivors, memory)


def test_vllm_samples_what_the_learner_thinks_and_takes_new_weights_in_mid_sentence(orphaned: Orphaned) -> None:
    rows = steps_of(orphaned.run_dir)
    assert rows[0]["mismatch/kl"] < 1e-4
    assert rows[0]["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-3)
    assert all(row["staleness/max"] <= BOUND for row in rows)
    assert num_mixed(orphaned.run_dir) > 0
    assert all(row["mismatch/kl"] < 1e-2 for row in rows)
    assert "Failed to load weights" not in (orphaned.run_dir / "logs" / "generator-0.log").read_text()


def test_nothing_outlives_a_killed_supervisor(orphaned: Orphaned) -> None:
    assert len(orphaned.tree) >= 5, "broker, learner, generator, its engine core and its reward worker"
    assert not orphaned.survivors


def test_what_a_killed_run_left_in_shared_memory_is_removed_by_the_next(orphaned: Orphaned, task: Path) -> None:
    assert len(orphaned.memory) == 2
    (task / "broken.py").write_text("raise RuntimeError('no such table')\n")
    with ClusterProcess(task, *flags(**{"run-name": "next", "reward": "broken.py:score"})) as run:
        assert run.end() == Exit.SETTINGS
    assert not any(folder.exists() for folder in orphaned.memory)


# --- What a new user gets wrong ---------------------------------------------------------------------------------------


MISTAKES = {
    "a setting that is none": ({"genrators": 2}, Exit.SETTINGS, "did you mean --generators?"),
    "a column that is missing": ({"dataset": "foo.jsonl"}, Exit.SETTINGS, "the rows have foo, answer"),
    "a dataset without rows": ({"dataset": "empty.jsonl"}, Exit.SETTINGS, "expected at least one row in"),
    "prompts that are all too long": ({"data.max_prompt_tokens": 1}, Exit.SETTINGS, "raise data.max_prompt_tokens"),
    "a model without a tokenizer": ({"model": "bare"}, Exit.SETTINGS, "expected a fast tokenizer (tokenizer.json)"),
    "no held-out rows": ({"dataset": "only", "evaluation.every": 5}, Exit.SETTINGS, "only has no test split"),
    "reward code that cannot be imported": (
        {"reward": "raises.py:score"},
        Exit.SETTINGS,
        "raises.py raised RuntimeError: no such table; mend the file",
    ),
    "a reward that raises every time": (
        {"reward": "key.py:score", "prompts-per-step": 2, "group-size": 2, "sampling.max_tokens": 2},
        Exit.NO_PROGRESS,
        "reward failed: key:score raised KeyError: 'gold'",
    ),
}


@pytest.fixture(scope="module")
def mistakes(task: Path) -> Path:
    (task / "foo.jsonl").write_text('{"foo": "w2 w3", "answer": "1"}\n')
    (task / "empty.jsonl").touch()
    (task / "bare").mkdir()
    (task / "bare" / "config.json").write_text((task / "model" / "config.json").read_text())
    (task / "only").mkdir()
    (task / "only" / "train.jsonl").write_text('{"question": "w2 w3", "answer": "1"}\n')
    (task / "raises.py").write_text("raise RuntimeError('no such table')\n")
    (task / "key.py").write_text("def score(completion, answer): raise KeyError('gold')\n")
    return task


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_an_exit_code(mistakes: Path, mistake: str) -> None:
    wrong, code, words = MISTAKES[mistake]
    with ClusterProcess(mistakes, *flags(**{"run-name": mistake.replace(" ", "-")}, **wrong)) as run:
        assert run.end(40.0) == code, run.said
    assert words in run.said
    assert "Traceback" not in run.said
    assert "restart" not in run.said
