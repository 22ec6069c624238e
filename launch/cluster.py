"""A whole run on this machine: settings, plan, processes, console, summary.

    python launch/cluster.py --generators 2 --learner-gpus 6

Holds the run's folder, starts broker, learner ranks and generators (`launch/supervisor.py`), and draws what they do
until the learner is done. The first Ctrl-C ends the run in order, the second at once; both can be resumed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from launch import preflight
from launch.broker_line import BrokerLine
from launch.console import Console, open_screen
from launch.devices import detect
from launch.flags import CommandLine, parse
from launch.make import make
from launch.plan import SHARED, Devices, Paths, Plan, implied_settings, plan
from launch.resumption import AUTO, Resumption, go_back, resumption, unfinished
from launch.run_folder import RunFolder, choose_addresses, free_ports
from launch.status_file import StatusFile
from launch.summary import summary
from launch.supervisor import Supervisor, Verdict
from protocol.addresses import Addresses
from protocol.errors import ConfigError, Exit, TetherError
from protocol.reward_model import check_reward_model
from protocol.rewards import check_rewards
from protocol.rollouts import check_rollout
from protocol.setting_names import known_keys, nearest
from protocol.settings import DEFAULT, Settings, Value, build, from_environment, read_recipe, read_saved
from protocol.sources import absolute_sources

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_RECIPE = "gsm8k"
"""Of a command that names neither a model nor data."""
RECIPES = REPOSITORY / "launch" / "recipes"
TICK_S = 0.1
DRAW_EVERY = 4  # ticks


class Start(NamedTuple):
    """What a command line comes to."""

    settings: Settings
    run_dir: Path
    to_make: str  # what the recipe of a new run wants made first
    resumption: Resumption | None = None  # None: a new run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return _main(parse(arguments), arguments, os.environ)
    except TetherError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(Exit.INTERRUPTED)


def _main(command: CommandLine, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    settings, run_dir, to_make, resumed = _start(command, environ)
    check_rewards([function.use for function in settings.config.all_rewards.functions])
    if settings.config.rewards.model.path:
        check_reward_model(settings.config.rewards.model)
    check_rollout(settings.config.rollout.use)
    if settings.config.network.bind:
        Addresses.from_url(settings.config.network.bind)
    devices = detect(settings.config.run.device, environ)
    preflight.check_device(settings.config, devices, environ)
    shape, reward_model = preflight.sizes(settings.config, fetch=not command.dry_run)
    settings = settings.override(implied_settings(settings.config, devices, shape))
    paths = Paths(REPOSITORY, run_dir, sys.executable, free_ports(1)[0])
    planned = plan(settings.config, devices, paths, resume=resumed is not None, shape=shape, reward_model=reward_model)
    if not to_make:
        preflight.check(settings.config)
    if command.dry_run:
        _show(
            _as_json(planned, settings, devices, run_dir) if command.as_json else _as_text(planned, settings, run_dir)
        )
        return int(Exit.DONE)

    addresses = choose_addresses(settings.config.network.bind)
    folder = RunFolder.reopen(run_dir) if resumed else RunFolder.create(run_dir)
    if resumed and resumed.checkpoint:
        print(go_back(resumed.checkpoint))
    if to_make:
        settings = make(to_make, settings, run_dir / "task", REPOSITORY)
        preflight.check(settings.config)
    for line in _columns(planned.memory):
        print(line)
    folder.write(settings, ["python", "launch/cluster.py", *arguments], addresses)
    return asyncio.run(_supervise(planned, settings, run_dir, environ)).code


async def _supervise(planned: Plan, settings: Settings, run_dir: Path, environ: Mapping[str, str]) -> Verdict:
    """Start everything and stay with it until nothing is left; then say how it ended and what came of it."""
    config, screen = settings.config, open_screen()
    console, status = Console(config, run_dir, screen), StatusFile(run_dir)

    def answered(answer: Mapping[str, Any]) -> None:
        console.answered(answer)
        status.answered(answer, supervisor.processes())

    broker = BrokerLine(run_dir, "cluster", answered)
    supervisor = Supervisor(
        planned, run_dir / "logs", environ, config.run.drain_s, config.generators.restarts, broker.drain, console.tell
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.interrupt())
    following = asyncio.get_running_loop().create_task(broker.follow())
    try:
        supervisor.start()
        console.start()
        console.tell(f"{len(planned.processes)} processes started; logs in {run_dir / 'logs'}")
        ticks = 0
        while (verdict := supervisor.tick()) is None:
            if ticks % DRAW_EVERY == 0:
                console.update(supervisor.processes())
            ticks += 1
            await asyncio.sleep(TICK_S)
        console.update(supervisor.processes())
    finally:
        supervisor.close()
        console.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await broker.close()
    status.ended(verdict, supervisor.processes())
    for line in [
        "",
        *summary(run_dir, screen.width),
        *_last_words(verdict, run_dir, only_evaluates=settings.config.run.evaluation_only),
    ]:
        print(line)
    return verdict


def _start(command: CommandLine, environ: Mapping[str, str]) -> Start:
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


def _as_text(planned: Plan, settings: Settings, run_dir: Path) -> str:
    lines = [f"{run_dir} (nothing is started)", ""]
    lines += [f"{process.name:<13} {process.device:<10} {' '.join(process.argv)}" for process in planned.processes]
    lines += ["", *_columns([*planned.notes, *planned.memory]), ""]
    given = [(value.key, _on_one_line(value.value), value.origin) for value in settings.values.values()]
    return "\n".join([*lines, *(f"{key} = {value}  ({origin})" for key, value, origin in given)])


def _on_one_line(value: object) -> object:
    return repr(value) if isinstance(value, str) and "\n" in value else value


def _show(text: str) -> None:
    """Print all of it, or as much as whoever reads wants to have (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _columns(notes: Sequence[tuple[str, str]]) -> list[str]:
    """As lines no wider than the terminal, or than 80 where there is none."""
    width, lines = shutil.get_terminal_size().columns, []
    for topic, sentence in notes:
        wrapped = textwrap.wrap(sentence, max(40, width - 12), break_long_words=False, break_on_hyphens=False)
        lines += [f"{topic:<11} {wrapped[0]}", *(f"{'':<11} {more}" for more in wrapped[1:])]
    return lines


def _as_json(planned: Plan, settings: Settings, devices: Devices, run_dir: Path) -> str:
    fields = {
        "run_dir": str(run_dir),
        "devices": {"kind": devices.kind, "cores": devices.cores, "cards": [card.name for card in devices.cards]},
        "processes": [
            {"name": p.name, "role": p.role, "device": p.device, "argv": list(p.argv), "env": dict(p.env)}
            for p in planned.processes
        ],
        "notes": dict(planned.notes),
        "memory": {topic.strip(): sentence for topic, sentence in planned.memory},
        "settings": settings.config.model_dump(mode="json"),
        "origins": {key: origin for key in known_keys() if (origin := settings.origin(key)) != DEFAULT},
    }
    return json.dumps(fields, indent=2)


def _last_words(verdict: Verdict, run_dir: Path, *, only_evaluates: bool) -> list[str]:
    if verdict.code == Exit.DONE:
        return [f"done: {verdict.text} ({run_dir})"]
    word = "stopped" if verdict.code == Exit.INTERRUPTED else "failed"
    resume = [] if only_evaluates else [f"resume: python launch/cluster.py --resume {run_dir}"]
    return [f"{word}: {verdict.text}", *resume]


if __name__ == "__main__":
    sys.exit(main())
