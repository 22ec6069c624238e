"""A whole run on this machine: settings, plan, processes, console, summary.

    python launch/cluster.py --generators 2 --learner-gpus 6

Holds the run's folder, starts broker, learner ranks and generators (`launch/supervisor.py`), and draws what they do
until the learner is done. The first Ctrl-C ends the run in order, the second at once; both can be resumed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from launch.plan import Paths, Plan, implied_settings, plan
from launch.plan_text import as_json, as_text, columns, show
from launch.resumption import go_back
from launch.run_folder import RunFolder, choose_addresses, free_ports
from launch.start import start
from launch.status_file import StatusFile
from launch.summary import summary
from launch.supervisor import Supervisor, Verdict
from protocol.addresses import Addresses
from protocol.errors import Exit, TetherError
from protocol.reward_model import check_reward_model
from protocol.rewards import check_rewards
from protocol.rollouts import check_rollout
from protocol.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
TICK_S = 0.1
DRAW_EVERY = 4  # ticks


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
    settings, run_dir, to_make, resumed = start(command, environ)
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
        show(as_json(planned, settings, devices, run_dir) if command.as_json else as_text(planned, settings, run_dir))
        return int(Exit.DONE)

    addresses = choose_addresses(settings.config.network.bind)
    folder = RunFolder.reopen(run_dir) if resumed else RunFolder.create(run_dir)
    if resumed and resumed.checkpoint:
        print(go_back(resumed.checkpoint))
    if to_make:
        settings = make(to_make, settings, run_dir / "task", REPOSITORY)
        preflight.check(settings.config)
    for line in columns(planned.memory):
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


def _last_words(verdict: Verdict, run_dir: Path, *, only_evaluates: bool) -> list[str]:
    if verdict.code == Exit.DONE:
        return [f"done: {verdict.text} ({run_dir})"]
    word = "stopped" if verdict.code == Exit.INTERRUPTED else "failed"
    resume = [] if only_evaluates else [f"resume: python launch/cluster.py --resume {run_dir}"]
    return [f"{word}: {verdict.text}", *resume]


if __name__ == "__main__":
    sys.exit(main())
