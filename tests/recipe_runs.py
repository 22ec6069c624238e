"""A recipe of `launch/recipes/` run by the real command with a tiny model: what is cut down, and on which rows.

Only sizes and places are changed, those of `cut_down`. All else is what the recipe says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from launch.start import RECIPES
from protocol.config import Config
from protocol.errors import Exit
from protocol.settings import Recipe, build, load, read_recipe
from tests.cluster_process import ClusterProcess, lines_of, steps_of
from tools.tiny_model import Shape, train_tokenizer, write_model
from tools.word_problems import Problem, split

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
NUM_STEPS = 2
NUM_WARMUP_STEPS = 2
NUM_TRAIN, NUM_HELD_OUT = 40, 6
TINY = Shape(hidden=64, layers=1, heads=2, intermediate=96)
ENDS_WITHIN_S = 240.0  # of one start with real vLLM, when the machine is slow
RESUMED = "gsm8k_ppo_qwen05b"


class Run(NamedTuple):
    """A recipe's run that is over."""

    folder: Path
    config: Config  # as the run had it
    steps: list[dict[str, Any]]
    metrics: list[dict[str, Any]]  # with those of warm start and evaluations
    evaluations: list[dict[str, Any]]


def recipe(name: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml")


def settings_of(name: str) -> Config:
    """What the recipe alone says."""
    return build(recipe(name).values).config


def make_recipe_task(folder: Path) -> Path:
    """A tiny model and rows in GSM8K's and in NuminaMath's columns."""
    train, held_out = split(0, NUM_TRAIN, NUM_HELD_OUT)
    for name, problems in (("train", train), ("test", held_out)):
        _write(folder / "gsm8k" / f"{name}.jsonl", [problem._asdict() for problem in problems])
        _write(folder / "numina" / f"{name}.jsonl", [_as_numina(problem) for problem in problems])
    system = (RECIPES / "r1_system.txt").read_text(encoding="utf-8")
    texts = [text for problem in train for text in problem]
    write_model(folder / "model", train_tokenizer([*texts, system, settings_of("gsm8k").data.suffix], 600), TINY, 0)
    return folder


def cut_down(name: str, task: Path, engine: str) -> dict[str, str | int]:
    """Settings that are sizes or places, as a run of two steps with a tiny model has them."""
    config, to_make = settings_of(name), recipe(name).make
    group = min(config.batch.group_size, 3)
    changed: dict[str, str | int] = {
        "run.device": "cpu",
        "run.steps": NUM_STEPS,
        "run.drain_s": 10,
        "generators.engine": engine,
        "generators.count": 1,
        "generators.max_running": 16,
        "learner.ranks": 1,
        "batch.group_size": group,
        "batch.prompts": min(config.batch.prompts, max(2, -(-config.algorithm.updates_per_batch // group))),
        "sampling.max_tokens": 12,
        "data.max_prompt_tokens": min(config.data.max_prompt_tokens, 400),
        "evaluation.max_prompts": NUM_HELD_OUT,
    }
    if not to_make.startswith("demo"):
        changed["data.train"] = str(task / ("numina" if config.data.prompt_column else "gsm8k"))
    if not to_make:
        changed["model.path"] = str(task / "model")
    if "warmup.steps" in {value.key for value in recipe(name).values}:
        changed["warmup.steps"] = NUM_WARMUP_STEPS
    return changed


def start(name: str, task: Path, engine: str) -> Run:
    """The recipe's run, which must end well."""
    changed = cut_down(name, task, engine)
    words = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    return _ended(task, name, "--recipe", name, "--run-name", name, *words)


def go_on(name: str, task: Path, num_steps: int) -> Run:
    """The recipe's run again, with more steps."""
    return _ended(task, name, "--resume", f"runs/{name}", "--steps", str(num_steps))


def _ended(task: Path, name: str, *arguments: str) -> Run:
    with ClusterProcess(task, *arguments) as cluster:
        assert cluster.end(ENDS_WITHIN_S) == Exit.DONE, cluster.said
    folder = task / "runs" / name
    metrics, evaluations = lines_of(folder / "metrics.jsonl"), lines_of(folder / "evaluations.jsonl")
    return Run(folder, load(folder / "config.yaml"), steps_of(folder), metrics, evaluations)


def _as_numina(problem: Problem) -> dict[str, str]:
    reasoning, _, number = problem.answer.partition("\n#### ")
    return {"problem": problem.question, "solution": f"We add it up: {reasoning} The answer is $\\boxed{{{number}}}$."}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
