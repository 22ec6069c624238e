"""What a command line asks for: a new run, with its recipe and settings, or to go on with one.

Run by `launch/cluster.py`. That a run can be continued from another folder rests on `_absolute`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.flags import CommandLine
from launch.plan import SHARED
from launch.resumption import AUTO, Resumption, resumption, unfinished
from protocol.errors import ConfigError
from protocol.setting_names import nearest
from protocol.settings import Settings, Value, build, from_environment, read_recipe, read_saved
from protocol.sources import absolute_sources

DEFAULT_RECIPE = "gsm8k"
"""Of a command that names neither a model nor data."""
RECIPES = Path(__file__).resolve().parent / "recipes"


class Start(NamedTuple):
    """What a command line comes to."""

    settings: Settings
    run_dir: Path
    to_make: str  # what the recipe of a new run wants made first
    resumption: Resumption | None = None  # None: a new run


def start(command: CommandLine, environ: Mapping[str, str]) -> Start:
    """What the command line asks for: a new run, or to go on with one."""
    outer = [*from_environment(environ), *command.values]
    if command.resume not in (None, AUTO):
        if command.recipe:
            raise ConfigError("--resume goes on with the settings that the run has; leave --recipe out")
        given = build(outer).config.run
        return _go_on(resumption(command.resume, Path(given.out), given.name), outer)
    wanted = command.recipe or ("" if {value.key for value in outer} & {"model.path", "data.train"} else DEFAULT_RECIPE)
    file = find_recipe(wanted) if wanted else None
    recipe = read_recipe(file) if file else None
    settings = _absolute(build(_found_beside(file, recipe.values) if file and recipe else [], outer))
    out, name = Path(settings.config.run.out), settings.config.run.name
    label = name or (Path(wanted).stem if wanted else "run")
    if command.resume == AUTO and (found := unfinished(out, label)):
        return _go_on(Resumption(found), [value for value in outer if value.key != "run.name"])
    if not name or (command.resume == AUTO and (out / name / "config.yaml").exists()):
        name = f"{label}-{time.strftime('%m%d-%H%M%S')}"
        settings = settings.override([Value("run.name", name, "name and time")])
    return Start(settings, (out / name).resolve(), recipe.make if recipe else "")


def _go_on(from_there: Resumption, outer: Sequence[Value]) -> Start:
    """A run goes on with the settings that it has, and those of this start over them."""
    saved = [value for value in read_saved(from_there.run_dir / "config.yaml") if value.origin != SHARED]
    settings = _absolute(build(saved, outer))
    return Start(settings, from_there.run_dir.resolve(), "", from_there)


def find_recipe(name: str) -> Path:
    """A file, or the recipe of that name. Raises ConfigError naming the nearest recipe."""
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name in known:
        return RECIPES / f"{name}.yaml"
    meant = f"; did you mean {nearest(name, known)}?" if known else ""
    raise ConfigError(
        f"expected a recipe's name or file behind --recipe, got {name}; there are {', '.join(known)}{meant}"
    )


def _found_beside(recipe: Path, values: Sequence[Value]) -> list[Value]:
    """A recipe's settings; its system message may name a text file that lies beside the recipe."""

    def found(value: Value) -> Value:
        beside = recipe.resolve().parent / str(value.value)
        return value._replace(value=str(beside)) if value.key == "data.system" and os.path.isfile(beside) else value

    return [found(value) for value in values]


def _absolute(settings: Settings) -> Settings:
    """The same, with files named from the root: the run may be continued from another folder."""
    keys = ("model.path", "critic.path", "data.system", "rewards.model.path")
    values = [
        value._replace(value=str(Path(value.value).resolve()))
        for value in settings.values.values()
        if value.key in keys and os.path.exists(value.value)  # of a text too long for a name too
    ]
    data, warmup = settings.config.data, settings.config.warmup
    for key, text in (("data.train", data.train), ("data.eval", data.eval), ("warmup.data", warmup.data)):
        if text and key in settings.values:
            values.append(settings.values[key]._replace(value=absolute_sources(text)))
    rewards = (("rewards.functions", settings.config.rewards.functions),)
    for key, used in (*rewards, ("evaluation.rewards", settings.config.evaluation.rewards)):
        if key not in settings.values:
            continue
        functions = [function.model_dump() for function in used]
        for function in functions:
            function["use"] = _absolute_code(function["use"])
        values.append(settings.values[key]._replace(value=functions))
    if "rollout.use" in settings.values:
        values.append(settings.values["rollout.use"]._replace(value=_absolute_code(settings.config.rollout.use)))
    return settings.override(values)


def _absolute_code(use: str) -> str:
    """FILE.py:NAME with the file named from the root; other names as they are."""
    file, colon, name = use.partition(":")
    return f"{Path(file).resolve()}:{name}" if colon and Path(file).is_file() else use
