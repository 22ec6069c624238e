"""The cluster command: what it prints, what it refuses and with which words, and a whole start and end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from launch.cluster import main
from launch.flags import parse
from launch.make import make
from launch.preflight import check, check_model, check_packages, check_shared_memory
from launch.resumption import newest_run
from launch.run_folder import RunFolder, choose_addresses
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import ConfigError, Exit, PreflightError
from protocol.rewards import names_in_evaluation, scored_by
from protocol.settings import build
from tests.wire import free_addresses

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = Addresses("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556")
DEADLINE_S = 30.0


def cluster(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=DEADLINE_S)


def model_folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return path


# --- What it says -----------------------------------------------------------------------------------------------------


def test_help_answers_from_any_folder_and_lists_every_setting(tmp_path: Path) -> None:
    said = cluster("--help", cwd=tmp_path)
    assert said.returncode == 0
    assert "what runs where" in said.stdout
    assert "--learner-gpus M" in said.stdout
    assert "gradient_checkpointing" in said.stdout


def test_a_python_without_the_packages_hands_over_to_the_projects_own(tmp_path: Path) -> None:
    bare = [sys._base_executable, "-I", str(ROOT / "launch" / "cluster.py"), "--genrators", "2"]  # type: ignore[attr-defined]
    result = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "did you mean --generators?" in result.stderr or "run make setup" in result.stderr


def test_a_dry_run_starts_nothing_and_is_valid_json(tmp_path: Path) -> None:
    flags = ("--generators", "2", "--learner-gpus", "2", "--device", "cpu", "--dry-run", "--json")
    said = cluster(*flags, cwd=tmp_path, TETHER__LEARNER__ZERO="2")
    assert said.returncode == 0, said.stderr
    fields = json.loads(said.stdout)
    assert [p["name"] for p in fields["processes"]] == [
        "broker",
        "learner-0",
        "learner-1",
        "generator-0",
        "generator-1",
    ]
    assert fields["settings"]["generators"]["count"] == 2
    assert fields["origins"]["generators.count"] == "--generators"
    assert fields["origins"]["learner.zero"] == "TETHER__LEARNER__ZERO"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_processes_arithmetic_and_origins(capsys: pytest.CaptureFixture[str]) -> None:
    text = "A system message too long for a file's name. " * 20
    assert main(("--dry-run", "--device", "cpu", "--prompts-per-step", "4", "--data.system", text)) == Exit.DONE
    said = capsys.readouterr().out
    assert "generator-0   cpu" in said
    assert "one step    4 prompts x 8 completions = 32 completions" in said
    assert "batch.prompts = 4  (--prompts-per-step)" in said


def test_a_dry_run_stays_within_eighty_columns_and_ends_quietly_when_nobody_reads_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(("--dry-run", "--device", "cpu")) == Exit.DONE
    arithmetic = capsys.readouterr().out.split("\n\n")[2]
    assert max(map(len, arithmetic.splitlines())) <= 80
    assert "\n            sampled tokens (512 each)\n" in arithmetic
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), "--dry-run", "--device", "cpu"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    said = subprocess.run(command, cwd=tmp_path, stdout=write_end, stderr=subprocess.PIPE, timeout=DEADLINE_S)
    os.close(write_end)
    assert (said.returncode, said.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--genrators", "2"), Exit.SETTINGS, "did you mean --generators?"),
        (("--learner.lrate", "2"), Exit.SETTINGS, "did you mean --learner.learning_rate?"),
        (("--zero", "7"), Exit.SETTINGS, "learner.zero must be less than or equal to 3, got 7 (--zero)"),
        (("--recipe", "no_such_thing"), Exit.SETTINGS, "expected a recipe's name or file behind --recipe"),
        (("--model", "./nowhere"), Exit.SETTINGS, "found no folder ./nowhere; set --model"),
        (("--device", "npu"), Exit.PREFLIGHT, "needs a card, none is visible: there must be one that npu-smi shows"),
        (("--resume", "nowhere"), Exit.SETTINGS, "expected a run with a config.yaml to resume"),
        (("--resume",), Exit.SETTINGS, "expected a run to resume below runs, found none"),
    ],
)
def test_a_wrong_command_line_is_one_error_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: Exit,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "runs").exists()


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_short_flags_and_dotted_names_are_one_layer() -> None:
    command = parse(
        ["--max-staleness", "3", "--vllm.max_model_len=512", "--share-gpu", "--learner.learning-rate", "2e-6"]
    )
    config = build(command.values).config
    assert (config.staleness.max, config.run.share_gpu, config.learner.learning_rate) == (3, True, 2e-6)
    assert config.vllm == {"max_model_len": 512}


def test_rewards_are_named_with_their_weights() -> None:
    values = parse(["--reward", "gsm8k", "--reward", "my/file.py:brevity:0.1", "--reward", "a.py:b"]).values
    functions = build(values).config.rewards.functions
    assert [(function.use, function.weight) for function in functions] == [
        ("gsm8k", 1.0),
        ("my/file.py:brevity", 0.1),
        ("a.py:b", 1.0),
    ]


def test_a_reward_model_is_a_folder_with_its_weight() -> None:
    for words, expected in ((["judges/a:0.5"], ("judges/a", 0.5)), (["judges/a"], ("judges/a", 1.0))):
        model = build(parse(["--reward-model", *words]).values).config.rewards.model
        assert (model.path, model.weight) == expected
    alone = build(parse(["--reward-model", "judge", "--rewards.functions", "[]"]).values).config
    assert scored_by(alone) == [("reward_model", 1.0)]
    assert names_in_evaluation(alone) == ["reward_model"]
    beside = parse(["--reward-model", "judge", "--reward", "length", "--eval-reward", "gsm8k"])
    assert names_in_evaluation(build(beside.values).config) == ["length", "gsm8k", "reward_model"]
    with pytest.raises(ConfigError, match=r"at least one reward is needed, got none; set rewards\.functions"):
        build(parse(["--rewards.functions", "[]"]).values)


def test_resume_may_name_its_run_or_not() -> None:
    assert parse([]).resume is None
    assert parse(["--resume", "--seed", "1"]).resume == ""
    assert parse(["--resume", "runs/a"]).resume == "runs/a"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learner.zero"], "--learner.zero needs a value"),
        (["--learner.zero", "--seed", "1"], "--learner.zero needs a value"),
        (["stray"], "expected a flag, got 'stray'"),
        (["--seed"], "expected one argument"),
    ],
)
def test_a_flag_without_its_value_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(words)


# --- The folder of a run ----------------------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = RunFolder.create(tmp_path / "a")  # keeps its lock until this function ends
    flags = ("--out", str(tmp_path), "--run-name", "a", "--device", "cpu")
    assert main(flags) == Exit.RUN_LOCKED
    assert f"{held.path} is used by a run that goes on (process {os.getpid()})" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("{}")
    assert main(("--out", str(tmp_path), "--run-name", "a", "--device", "cpu")) == Exit.SETTINGS
    assert f"holds a run already; continue it with --resume {tmp_path / 'a'}" in capsys.readouterr().err


def test_a_run_folder_holds_what_its_processes_read(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    folder.write(build(), ["python", "launch/cluster.py", "--seed", "a b"], ADDRESSES)
    assert Addresses.read(folder.path) == ADDRESSES
    assert (folder.path / "command.txt").read_text() == "python launch/cluster.py --seed 'a b'\n"
    assert sorted(path.name for path in (folder.path / "keys").iterdir()) == [
        "generator.key",
        "learner.key",
        "server.key",
        "status.key",
    ]
    run_id = json.loads((folder.path / "broker.json").read_text())["run_id"]
    folder.write(build(), ["again"], ADDRESSES)
    assert json.loads((folder.path / "broker.json").read_text())["run_id"] == run_id


def test_the_newest_run_is_resumed(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.yaml"
        config.touch()
        os.utime(config, (1000 - age, 1000 - age))
    assert newest_run(tmp_path).name == "new"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="choose another place with --out"):
        RunFolder.create(tmp_path / "file" / "run")


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert main(("--bind", bind, "--device", "cpu", "--out", str(tmp_path / "runs"))) == Exit.RUN_LOCKED
    assert f"--bind {bind} needs {bind}, but address already in use" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_addresses_are_free_loopback_ports_or_those_asked_for() -> None:
    assert all(address.startswith("tcp://127.0.0.1:") for address in choose_addresses(""))
    free = free_addresses()
    assert choose_addresses(free.control) == free
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        choose_addresses("localhost:1")


# --- Preflight --------------------------------------------------------------------------------------------------------


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_folder(tmp_path / "model", "config.json", "model.safetensors")
    assert main(("--model", str(model), "--device", "cpu", "--out", str(tmp_path / "runs"))) == Exit.SETTINGS
    expected = f"expected a fast tokenizer (tokenizer.json) in the model folder {model}, found none"
    assert expected in capsys.readouterr().err


def test_a_model_folder_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a config\.json"):
        check_model(str(model_folder(tmp_path / "model", "tokenizer.json")))
    check_model(str(model_folder(tmp_path / "good", "tokenizer.json", "config.json")))
    check_model("Qwen/Qwen2.5-0.5B-Instruct")


def test_shared_memory_needs_room_for_three_snapshots(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a TiB that nobody writes
    with pytest.raises(PreflightError, match=r"expected room for 3 snapshots of 1099\.51 GB, found .* GB free"):
        check_shared_memory(model, tmp_path)
    with pytest.raises(PreflightError, match=r"expected room for 1 snapshot of 1099\.51 GB"):
        check_shared_memory(model, tmp_path, copies=1)


def test_with_adapters_shared_memory_needs_room_for_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path / "model", "config.json", "tokenizer.json")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free // 2)  # sparse
    given = {"model": {"path": str(model)}, "generators": {"engine": "fake"}}
    with pytest.raises(PreflightError, match="expected room for 3 snapshots"):
        check(Config.model_validate(given), tmp_path)
    check(Config.model_validate(given | {"lora": {"rank": 8}}), tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(PreflightError, match="this run needs the package vllm"):
        check_packages(Config())
    check_packages(Config.model_validate({"generators": {"engine": "fake"}}))


def test_an_unknown_thing_to_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of demo"):
        make("cake", build(), tmp_path, ROOT)


# --- A whole start and end --------------------------------------------------------------------------------------------


def test_a_run_that_cannot_read_its_data_ends_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Real processes: the broker refuses the data, the learner and the generator are taken down with it."""
    model = model_folder(tmp_path / "model", "config.json")
    Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(model / "tokenizer.json"))
    (tmp_path / "empty.jsonl").touch()
    flags = ("--model", str(model), "--dataset", "empty.jsonl", "--device", "cpu", "--run-name", "a")
    result = cluster(*flags, "--generators.engine", "fake", cwd=tmp_path)
    last = result.stdout.splitlines()[-2:]
    assert result.returncode == Exit.SETTINGS, result.stdout
    assert last[0].startswith("failed: broker ended with code 2 (settings): ")
    assert last[1] == f"resume: python launch/cluster.py --resume {tmp_path / 'runs' / 'a'}"
    only = ("--run.evaluation_only", "true", "--data.eval", "empty.jsonl", "--run-name", "b")
    result = cluster(*flags[:-2], *only, "--generators.engine", "fake", cwd=tmp_path)
    assert result.stdout.splitlines()[-1].startswith("failed: "), "an evaluation has nothing to resume"
    assert not _processes_of(tmp_path)


def test_ctrl_c_twice_leaves_within_two_seconds(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "config.json", "tokenizer.json")
    fifo = tmp_path / "train.jsonl"
    os.mkfifo(fifo)  # a broker that waits for data for ever
    flags = ["--model", str(model), "--dataset", str(fifo), "--device", "cpu", "--generators.engine", "fake"]
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), *flags]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    deadline = time.monotonic() + DEADLINE_S
    try:
        assert "processes started" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert "ending in order within" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        started = time.monotonic()
        running.wait(timeout=deadline - started)
        assert time.monotonic() - started < 2.0
        assert running.returncode == Exit.INTERRUPTED
        assert not _processes_of(tmp_path)
    finally:
        running.kill()
        running.stdout.close()


def _processes_of(run_dir: Path) -> list[int]:
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if any(str(run_dir) in word for word in p.info["cmdline"] or ())
    ]
