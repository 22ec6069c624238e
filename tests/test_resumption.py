"""--resume auto | never | PATH: which run, and which checkpoint, is gone on from."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.cluster import main
from launch.flags import parse
from launch.resumption import Resumption, go_back, is_complete, resumption, unfinished
from protocol.checkpoints import MANIFEST_FILE, checkpoints, damage, seal
from protocol.errors import ConfigError, Exit
from tests.cluster_process import ClusterProcess, fast_flags, make_task, samples_of, steps_of

NUM_STEPS, BACK_TO = 60, 40
DONE = {"code": 0, "text": "the run is complete"}
DRAINED = {"code": 130, "text": "interrupted"}

pytestmark = pytest.mark.timeout(240)


def run_folder(path: Path, age: int = 0, ended: dict[str, Any] | None = None, status: bool = True) -> Path:
    """A run that was started `age` seconds before the others, and how it ended; None: it goes on, or was killed."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("run:\n  steps: 7  # --steps\n")
    os.utime(path / "config.yaml", (100_000 - age, 100_000 - age))
    if status:
        (path / "status.json").write_text(json.dumps({"ended": ended}))
    return path


def add_checkpoints(run_dir: Path, *steps: int) -> list[Path]:
    paths = [run_dir / "checkpoints" / f"step_{step}" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        path.mkdir(parents=True)
        (path / "state.msgpack").write_text(f"of step {step}")
        seal(path, step, {})
    return paths


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(("--device", "cpu", "--dry-run", "--json", *flags)) == Exit.DONE
    return dict(json.loads(capsys.readouterr().out))


# --- Which run --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_run_of_the_name_that_is_not_complete(tmp_path: Path) -> None:
    run_folder(tmp_path / "a-1120-100000", age=1, ended=DONE)
    drained = run_folder(tmp_path / "a-1120-090000", age=2, ended=DRAINED)
    killed = run_folder(tmp_path / "a", age=3)
    run_folder(tmp_path / "a-long", ended=DRAINED)
    run_folder(tmp_path / "b", ended=DRAINED)
    (tmp_path / "a-1120-110000").mkdir()  # made, but nothing was started in it
    assert unfinished(tmp_path, "a") == drained
    (drained / "status.json").write_text(json.dumps({"ended": DONE}))
    assert unfinished(tmp_path, "a") == killed
    (killed / "status.json").write_text(json.dumps({"ended": DONE}))
    assert unfinished(tmp_path, "a") is None
    assert unfinished(tmp_path / "nowhere", "a") is None


def test_a_run_that_was_killed_before_it_said_anything_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(run_folder(tmp_path / "a", status=False))
    (run_folder(tmp_path / "torn") / "status.json").write_text("")  # after the machine lost its power
    assert not is_complete(tmp_path / "torn")
    assert not is_complete(run_folder(tmp_path / "b", ended={"code": 1, "text": "failed"}))
    assert is_complete(run_folder(tmp_path / "c", ended=DONE))


def test_the_same_command_with_auto_starts_goes_on_and_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("--recipe", "gsm8k", "--resume", "auto", "--run-name", "a", "--seed", "3")
    first = dry_run(capsys, *command)
    assert first["run_dir"] == str(tmp_path / "runs" / "a")
    assert "--resume" not in first["processes"][1]["argv"]

    run_folder(tmp_path / "runs" / "a", ended=DRAINED)
    second = dry_run(capsys, *command)
    assert second["run_dir"] == first["run_dir"]
    assert "--resume" in second["processes"][1]["argv"]
    assert second["origins"]["run.steps"] == "--steps", "the run's own setting"
    assert (second["settings"]["run"]["steps"], second["settings"]["run"]["seed"]) == (7, 3)

    (tmp_path / "runs" / "a" / "status.json").write_text(json.dumps({"ended": DONE}))
    third = dry_run(capsys, *command)
    assert re.fullmatch(rf"{tmp_path}/runs/a-\d{{4}}-\d{{6}}", third["run_dir"])
    assert third["settings"]["run"]["name"] == Path(third["run_dir"]).name
    assert "--resume" not in third["processes"][1]["argv"]


def test_auto_without_a_name_goes_by_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "demo-1120-100000", ended=DRAINED)
    ours = run_folder(tmp_path / "runs" / "gsm8k-1120-090000", age=9, ended=DRAINED)
    assert dry_run(capsys, "--resume", "auto")["run_dir"] == str(ours)


def test_never_is_as_without_the_flag() -> None:
    assert parse(["--resume", "never", "--seed", "1"]) == parse(["--seed", "1"])


# --- Which checkpoint -------------------------------------------------------------------------------------------------


def test_a_path_is_a_run_or_a_checkpoint_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run_folder(tmp_path / "a")
    (path,) = add_checkpoints(run_dir, 4)
    assert resumption(str(run_dir), Path("runs"), "") == Resumption(run_dir)
    assert resumption(str(path), Path("runs"), "") == Resumption(run_dir, path)
    assert resumption("", tmp_path, "a") == resumption("", tmp_path, "") == Resumption(run_dir)
    monkeypatch.chdir(path)
    assert resumption(".", Path("runs"), "") == Resumption(run_dir, path)


def test_a_checkpoint_that_is_not_there_or_belongs_to_no_run_is_refused(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "a")
    there = add_checkpoints(run_dir, 4, 12)
    with pytest.raises(ConfigError) as refused:
        resumption(str(run_dir / "checkpoints" / "step_5"), Path("runs"), "")
    assert str(refused.value).endswith(f"step_5; there are: {there[0]}, {there[1]}")
    (alone,) = add_checkpoints(tmp_path / "b", 4)
    with pytest.raises(ConfigError, match=f"{alone} lies in no run; .* these weights: --model {alone}/hf"):
        resumption(str(alone), Path("runs"), "")


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "a")
    paths = add_checkpoints(run_dir, 4, 8, 12, 16)
    said = go_back(paths[1])
    assert checkpoints(run_dir / "checkpoints") == paths[:2]
    (aside,) = (run_dir / "checkpoints").glob("left-*")
    assert said == f"going on from {paths[1]}; the later step_12, step_16 are in {aside}"
    assert [damage(path) for path in checkpoints(aside)] == ["", ""]
    assert go_back(paths[1]) == f"going on from {paths[1]}"


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path) -> None:
    paths = add_checkpoints(run_folder(tmp_path / "a"), 4, 8, 12)
    (paths[1] / "state.msgpack").write_text("of step 9")
    with pytest.raises(
        ConfigError, match=r"step_8 is damaged, state.msgpack does not match its digest; .*step_4, step_12"
    ):
        go_back(paths[1])
    assert checkpoints(paths[1].parent) == paths


# --- A whole run ------------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """A run that one command started and went on with, and that then went on from one of its checkpoints."""

    run_dir: Path
    drained_at: int
    log: str  # of the learner, of the first two starts
    back: str  # what the third start said
    log_after: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    task = make_task(tmp_path_factory.mktemp("resumed"))
    run_dir = task / "runs" / "a"
    wanted: dict[str, str | int] = {"run-name": "a", "resume": "auto", "steps": NUM_STEPS}
    wanted |= {"checkpoint.every": 10, "checkpoint.keep": 9}
    with ClusterProcess(task, *fast_flags(**wanted)) as first:
        first.until_step(run_dir, 2)
        first.interrupt()
        assert first.end() == Exit.INTERRUPTED, first.said
    drained_at = len(steps_of(run_dir))
    with ClusterProcess(task, *fast_flags(**wanted)) as second:
        assert second.end() == Exit.DONE, second.said
    learner = run_dir / "logs" / "learner-0.log"
    log = learner.read_text()
    with ClusterProcess(task, "--resume", str(run_dir / "checkpoints" / f"step_{BACK_TO}")) as third:
        assert third.end() == Exit.DONE, third.said
    return Ran(run_dir, drained_at, log, third.said, learner.read_text().removeprefix(log))


def test_one_command_starts_a_run_and_goes_on_with_it(ran: Ran) -> None:
    assert 3 <= ran.drained_at < NUM_STEPS
    assert f"resuming from the checkpoint of version {ran.drained_at}" in ran.log
    assert [path.name for path in ran.run_dir.parent.iterdir()] == ["a"]


def test_a_run_goes_on_from_the_checkpoint_that_was_named(ran: Ran) -> None:
    (aside,) = (ran.run_dir / "checkpoints").glob("left-*")
    assert f"step_{BACK_TO}; the later step_50, step_60 are in {aside}" in ran.back
    assert f"resuming from the checkpoint of version {BACK_TO}" in ran.log_after
    assert [row["step"] for row in steps_of(ran.run_dir)] == list(range(NUM_STEPS))
    assert [damage(ran.run_dir / "checkpoints" / f"step_{step}") for step in (50, 60)] == ["", ""]


def test_samples_of_a_run_have_their_rewards_by_function(ran: Ran) -> None:
    samples = samples_of(ran.run_dir)
    assert len(samples) == NUM_STEPS * 4 * 4
    for sample in samples:
        assert sample["rewards"] == {"reward:score": pytest.approx(sample["reward"])}
        assert len(sample["group_rewards"]) == 4
        assert sample["reward"] in sample["group_rewards"]
        assert sample["completion_tokens"] == sample["versions"][-1][2]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_over_them(ran: Ran, tmp_path: Path) -> None:
    copy = tmp_path / "a"
    shutil.copytree(ran.run_dir, copy)
    paths = checkpoints(copy / "checkpoints")
    for path in paths:
        (path / MANIFEST_FILE).write_text("{}")
    with ClusterProcess(tmp_path, "--resume", "a", "--run.steps", str(NUM_STEPS + 1)) as cluster:
        assert cluster.end() == Exit.SETTINGS, cluster.said
    assert f"expected a checkpoint to resume from in {copy / 'checkpoints'}, all there are damaged" in cluster.said
    assert checkpoints(copy / "checkpoints") == paths
    assert len(steps_of(copy)) == NUM_STEPS
