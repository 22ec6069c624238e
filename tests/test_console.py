"""What is drawn of a run, on narrow and wide terminals and in a pipe, whatever a model or a stranger wrote."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console as Screen

from launch.bottleneck import bottleneck, is_waiting
from launch.chart import chart, printable, sparkline
from launch.console import Console
from launch.frames import evaluation_line, frame, step_line, waiting_line
from launch.history import History
from launch.logs import first_error
from launch.picture import Picture, duration, seconds_per_step
from launch.plan import ProcessRole
from launch.supervisor import Seen
from protocol.config import Config

HOSTILE = "[bold red]x[/] \x1b[2J\x1b]0;title\x07 \u202e\r\n"

STEPS = [
    {
        "step": i,
        "time": 1000 + 1.5 * i,
        "reward/mean": 0.2 + 0.004 * i,
        "mismatch/kl": 0.0012,
        "policy/entropy": 0.8,
        "completion/length_mean": 231.0,
        "completion/truncated_frac": 0.004,
        "staleness/mean": 0.9,
        "staleness/max": 2.0,
        "time/waiting_for_trajectories": 0.2,
        "throughput/step_s": 0.3 if i % 2 else 2.7,
        "throughput/tokens_per_s": 41200.0,
    }
    for i in range(128)
]
EVALUATIONS = [
    {"version": 0, "accuracy": 0.3, "num_prompts": 200},
    {"version": 120, "accuracy": 0.498, "num_prompts": 200},
]
SEEN = [
    Seen("broker", ProcessRole.BROKER, "cpu", "running", 0),
    Seen("learner-0", ProcessRole.LEARNER, "cuda 0", "running", 0),
    Seen("generator-0", ProcessRole.GENERATOR, "cuda 1", "running", 0),
    Seen("generator-1", ProcessRole.GENERATOR, "cuda 2", "down, restart in 2 s", 1),
]


def process(name: str, role: str, state: str, detail: str = "", **more: Any) -> dict[str, Any]:
    fields = {"for_s": 1.2, "seen_s": 0.3, "version": 127, "numbers": {}}
    return {"name": name, "role": role, "state": state, "detail": detail, **fields, **more}


def status(**more: Any) -> dict[str, Any]:
    processes = [
        process("learner-0", "learner", "waiting_for_trajectories", "41 of 64 groups are finished"),
        process("generator-0", "generator", "waiting", "at_bound", for_s=100.0),
        process("far away", "generator", "generating", HOSTILE, seen_s=14.0),
    ]
    ledger = {"offered": 9000, "queued": 0, "leased": 80, "finished": 20, "trained": 8192, "filtered": 3, "failed": 1}
    ledger |= {f"filtered/{HOSTILE}": 3}
    fields = {"phase": "running", "version": 128, "training_step": 128, "num_steps": 435, "verdict": ""}
    return {"ledger": ledger, "processes": processes, **fields, **more}


def picture(**more: Any) -> Picture:
    fields: dict[str, Any] = {
        "name": "demo-1",
        "config": Config(),
        "processes": SEEN,
        "steps": STEPS,
        "evaluations": EVALUATIONS,
        "run_dir": "runs/demo-1",
        "status": status(),
        "rates": {"generator-0": 9812.0},
        "waiting": {"learner-0": 0.4, "generator-0": 0.1},
    }
    return Picture(**(fields | more))


def drawn(width: int, shown: Picture) -> str:
    screen = Screen(width=width, file=io.StringIO(), force_terminal=False)
    screen.print(frame(shown))
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    assert max(cell_len(line) for line in text.splitlines()) <= width
    return text


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_fits_and_says_what_matters(width: int) -> None:
    text = " ".join(drawn(width, picture()).split())
    assert "step 128/435" in text
    assert "29% 1.50 s/step ETA 8 min version 128" in text
    assert "reward 0.708" in text
    assert "(+0.080/20) eval 49.8% @v120 (was 30.0%)" in text
    assert "staleness mean 0.90 max 2 of 2" in text
    assert "offered 9,000 queued 0 leased 80 finished 20 trained 8,192" in text
    assert "down, restart in 2 s" in text
    assert "9,812 tok/s" in text
    assert "bottleneck: generation" in text
    assert "tensorboard --logdir runs/demo-1" in text


def test_on_a_wide_terminal_everybody_says_for_whom_it_waits() -> None:
    text = drawn(200, picture())
    assert re.search(r"generator-0 +cuda 1 +waiting: at the staleness bound +2 min", text)
    assert re.search(r"learner-0 +cuda 0 +waiting for trajectories: 41 of 64 groups are finished", text)
    assert "silent for 14 s, was generating" in text


@pytest.mark.parametrize("width", [80, 200])
def test_hostile_text_reaches_the_screen_spelled_out(width: int) -> None:
    text = drawn(width, picture(name=HOSTILE))
    assert not set(text) & set("\x1b\x07\r\u202e")
    assert r"[bold red]x[/] \x1b[2J\x1b]0;title\x07 \u202e\r\n" in "".join(text.split("\n"))


def test_prompts_that_came_to_nothing_are_shown_with_their_reasons() -> None:
    ledger = {
        "offered": 10,
        "trained": 6,
        "filtered": 3,
        "failed": 1,
        "filtered/prompt_too_long": 3,
        "failed/KeyError": 1,
    }
    text = drawn(200, picture(status=status(ledger=ledger)))
    assert "trained 6   filtered 3 (prompt_too_long 3)   failed 1 (KeyError 1)" in text
    text = drawn(200, picture(status=status(ledger={"offered": 10, "trained": 10, "filtered": 0, "failed": 0})))
    assert "filtered" not in text


def test_a_narrow_terminal_breaks_lines_between_curves_only() -> None:
    for width in range(60, 140):
        assert "cut off 0.4%" in drawn(width, picture()), f"a curve is broken at {width} columns"


def test_a_model_in_a_folder_is_called_by_its_name() -> None:
    config = Config.model_validate({"model": {"path": "/somewhere/far/away/tiny"}})
    assert "GRPO · tiny · 1 generator" in drawn(80, picture(config=config))


@pytest.mark.parametrize(
    ("state", "detail", "said"),
    [
        ("generating", "", "generating"),
        ("generating", "at_bound", "generating (at the staleness bound)"),
        ("waiting", "at_bound", "waiting: at the staleness bound"),
        ("waiting", "a lease", "waiting: a lease"),
        ("waiting_for_trajectories", "of step 3", "waiting for trajectories of step 3"),
        ("checkpointing", "version 3", "checkpointing: version 3"),
    ],
)
def test_a_state_reads_as_a_sentence(state: str, detail: str, said: str) -> None:
    processes = [process("generator-0", "generator", state, detail)]
    assert re.search(rf"cuda 1 +{re.escape(said)}  ", drawn(200, picture(status=status(processes=processes))))


def test_before_anybody_answers_a_frame_says_so() -> None:
    text = drawn(80, picture(steps=(), evaluations=(), status={}, waiting={}))
    assert "starting: the broker reads the data" in text
    assert "bottleneck: not known yet" in text


def test_the_warm_start_is_shown_while_there_is_no_step() -> None:
    rows = [{"step": i, "time": 0.0, "warmup/loss": 3.0 - i} for i in range(3)]
    assert "warm start 3/0   loss 1.000 █▅▁" in drawn(80, picture(steps=(), warmup=rows))


def test_a_step_is_one_line() -> None:
    line = step_line(STEPS[-1], picture())
    assert line.startswith(
        "step 128/435  reward 0.708  mismatch 0.0012  entropy 0.80  length 231  staleness 0.9  waited 20%"
    )
    assert line.endswith("1.50 s/step  ETA 8 min")


def test_an_evaluation_is_one_line() -> None:
    assert evaluation_line(EVALUATIONS[1]) == "evaluation of version 120: accuracy 49.8% (100 of 200)"
    scored = {"source": "", "function": "gsm8k", "prompts": 190, "metrics": {"mean@1": 0.3}}
    failed = EVALUATIONS[0] | {"errors": 10, "scores": [scored]}
    assert evaluation_line(failed).endswith("accuracy 30.0% (57 of 190; 10 failed)")


def test_the_pace_counts_the_waiting_between_bursts() -> None:
    rows = [{"step": i, "throughput/step_s": s} for i, s in enumerate((60.0, 0.1, 0.1, 2.8))]
    assert seconds_per_step(rows) == pytest.approx(1.0)
    assert seconds_per_step(rows[:1]) is None


def test_waiting_names_who_waits_for_what() -> None:
    line = waiting_line(picture(), 30)
    assert line.startswith("waiting 30 s for step 129  broker: running | learner-0: waiting for trajectories: 41 of 64")
    assert "generator-0: waiting: at the staleness bound 2 min | generator-1: down, restart in 2 s | far away" in line
    assert printable(line) == line


def test_an_evaluation_of_k_completions_says_what_any_and_most_of_them_came_to() -> None:
    def scores(function: str, **metrics: float) -> dict[str, Any]:
        return {"source": "", "function": function, "prompts": 190, "metrics": metrics}

    strict = scores("gsm8k", **{"mean@8": 0.3, "pass@8": 0.8, "maj@8": 0.4})
    row = EVALUATIONS[0] | {
        "samples_per_prompt": 8,
        "errors": 80,
        "scores": [strict, scores("lenient", **{"mean@8": 0.6})],
    }
    assert evaluation_line(row, ["lenient"]) == (
        "evaluation of version 0: accuracy 30.0% (mean@8 of 190 prompts; 80 failed), pass@8 80.0%, maj@8 40.0%, "
        "lenient 60.0%"
    )
    nothing = row | {"accuracy": None}
    assert evaluation_line(nothing) == "evaluation of version 0: no completion was scored; 80 failed"
    by_model = nothing | {"rewards": {"reward_model": 1.52634, "environment/left": 3.0}, "scores": [], "errors": 0}
    assert evaluation_line(by_model) == "evaluation of version 0: reward_model 1.526"


def test_a_pipe_gets_each_step_and_evaluation_once(tmp_path: Path) -> None:
    screen = Screen(width=200, file=io.StringIO(), force_terminal=False)
    console = Console(Config(), tmp_path, screen)
    console.start()
    console.answered(status())
    for count in (2, 3):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS[:count]))
        (tmp_path / "evaluations.jsonl").write_text(json.dumps(EVALUATIONS[0]) + "\n")
        console.update(SEEN)
    console.close()
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [re.findall(r"step \d+/435|evaluation of version \d+", line) for line in lines] == [
        ["evaluation of version 0"],
        ["step 1/435"],
        ["step 2/435"],
        ["step 3/435"],
    ]


def test_what_the_run_reads_is_said_once(tmp_path: Path) -> None:
    screen = Screen(width=80, file=io.StringIO(), force_terminal=False)
    console = Console(Config(), tmp_path, screen)
    notes = ["7473 training rows from openai/gsm8k: prompt <- question", "256 held-out prompts"]
    for answer in (status(), status() | {"data": notes}, {}, status() | {"data": notes}):
        console.answered(answer)
        console.update(SEEN)
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert [said.count(note) for note in notes] == [1, 1]


def test_a_pipe_is_never_silent_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(width=200, file=io.StringIO(), force_terminal=False)
    console = Console(Config(), tmp_path, screen)
    monkeypatch.setattr("launch.console.QUIET_S", 0.0)
    console.update(SEEN)
    assert "for the broker's first answer" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_start_of_a_run_says_nothing_about_its_bottleneck(tmp_path: Path) -> None:
    screen = Screen(width=200, file=io.StringIO(), force_terminal=False)
    console = Console(Config(), tmp_path, screen)
    for _ in range(10):
        console.answered(status())
    console.print_once()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEPS[0]) + "\n")
    console.print_once()
    for _ in range(10):
        console.answered(status())
    console.print_once()
    said = re.findall(r"bottleneck: (.*)", screen.file.getvalue())  # type: ignore[attr-defined]
    assert said[:2] == ["not known yet"] * 2
    assert "learner waits 100%" in said[2]


def test_history_reads_on_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    history, path = History(tmp_path), tmp_path / "metrics.jsonl"
    history.read()
    path.write_text('{"step": 0, "reward/mean": 1.0}\n{"step": 0, "eval/accuracy": 0.5}\n{"step": 1, "rew')
    history.read()
    assert [row["step"] for row in history.steps] == [0]
    with path.open("a") as file:
        file.write('ard/mean": 2.0}\n')
    history.read()
    assert [row["reward/mean"] for row in history.steps] == [1.0, 2.0]


def test_history_starts_again_when_a_resumed_learner_cut_the_file(tmp_path: Path) -> None:
    history, path = History(tmp_path), tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "reward/mean": 0.0}) + "\n" for i in range(5)))
    history.read()
    path.write_text('{"step": 0, "reward/mean": 9.0}\n')
    history.read()
    assert [row["reward/mean"] for row in history.steps] == [9.0]


@pytest.mark.parametrize(
    ("learner", "generator", "device", "staleness", "said"),
    [
        (0.02, 0.03, "cuda", 2, "none (learner waits 2%, generators 3% of their time)"),
        (0.50, 0.03, "cuda", 2, "--generators 2"),
        (0.01, 0.40, "cuda", 2, "--learner-gpus 2"),
        (0.50, 0.40, "cuda", 0, "--max-staleness 1"),
        (0.01, 0.40, "cpu", 2, "the learner (learner waits 1%, generators 40% of their time)"),
        (0.50, 0.03, "cpu", 2, "; all 2 cores are in use"),
    ],
)
def test_the_bottleneck_comes_with_the_flag_that_moves_it(
    learner: float, generator: float, device: str, staleness: int, said: str
) -> None:
    config = Config.model_validate({"run": {"device": device}, "staleness": {"max": staleness}})
    assert said in bottleneck({"learner-0": learner, "generator-0": generator}, config, cores=2)


def test_waiting_for_each_other_is_not_waiting_for_the_other_side() -> None:
    assert is_waiting("waiting_for_trajectories")
    assert not is_waiting("waiting_for_ranks")
    assert not is_waiting("training")


CHAIN = """\
all is well
Traceback (most recent call last):
  File
    f()
KeyError: 'a'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File
RuntimeError: b
"""
ENGINE_CORE = """\
(EngineCore pid=3) ERROR 11-20 [core.py:1] Traceback (most recent call last):
(EngineCore pid=3) ERROR 11-20 [core.py:1]   File
(EngineCore pid=3) ERROR 11-20 [core.py:1] torch.OutOfMemoryError: CUDA
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("12:00:01 I x y: hello\n12:00:02 E broker tether.broker: no column\n", "no column"),
        (CHAIN, "KeyError: 'a'"),
        (ENGINE_CORE, "torch.OutOfMemoryError: CUDA"),
        ("fine\nfatal: disk full\nbye\n", "fatal: disk full"),
        ("12:00:01 I x y: hello\n", ""),
    ],
)
def test_a_log_is_asked_for_its_first_error(log: str, error: str) -> None:
    assert first_error(log) == error


def test_a_sparkline_averages_what_does_not_fit() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([5.0], 4) == "▄"
    assert sparkline([], 4) == ""


def test_a_chart_has_its_scale_and_its_range() -> None:
    lines = chart([0, 50, 100], [0.0, 1.0, 0.5], 40, 4)
    assert [line.split("┤")[0].strip() for line in lines[:4]] == ["1", "", "", "0"]
    assert lines[4].split() == ["0", "100"]
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(("seconds", "said"), [(4.2, "4 s"), (99, "99 s"), (720, "12 min"), (11100, "3 h 05 min")])
def test_durations_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said
