"""A generator: samples and scores completions for a run, here or on any host that reaches its broker.

    python launch/generator.py --connect tcp://HOST:PORT --key generator.key    joins a running job, may leave any time
    python launch/generator.py --run-dir RUN --name generator-0                 as launch/cluster.py starts it

Needs no weights on its disk: the model's config and tokenizer come from the broker, the weights from the learner.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where a package would be a file
    from protocol.own_python import use_own_python

    use_own_python()

from launch.flags import weighted
from launch.log_lines import log_to_stderr
from protocol import settings
from protocol.accelerators import DEVICES
from protocol.addresses import Addresses, host_identity
from protocol.config import Config
from protocol.errors import ConfigError, Exit, PeerTimeout, TetherError
from protocol.keys import read_client_key
from protocol.messages import Beat, Hello, Role
from protocol.parent import leave_with_parent
from protocol.rewards import reward_digest, with_files
from protocol.rollouts import rollout_digest, with_own_file
from protocol.sections import RolloutConfig
from protocol.session import Session
from protocol.shared_memory import private_folder

if TYPE_CHECKING:
    from actors.rollouts.runner import RolloutRunner

Outcome = TypeVar("Outcome")
log = logging.getLogger("tether.generator")

ROLLOUT_S = 300.0  # heavy libraries come from slow disks
JOIN_S = 120.0  # the broker may be started after its generators


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--connect", metavar="tcp://HOST:PORT", help="the broker's control address (broker.json in the run folder)"
    )
    where.add_argument("--run-dir", type=Path, help="a run on this host")
    parser.add_argument("--key", type=Path, help="key file; RUN/keys/generator.key of the run's host")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="what the console calls it")
    parser.add_argument("--device", choices=DEVICES, help="where to compute; default: as the run does")
    parser.add_argument("--reward", action="append", default=[], metavar="CODE:NAME", help="reward code of the run")
    parser.add_argument("--reward-model", default="", metavar="FOLDER", help="where the run's reward model lies here")
    parser.add_argument(
        "--rollout", default="", metavar="CODE:NAME", help="rollout of the run, where it is no built-in"
    )
    args = parser.parse_args(argv)
    if args.connect and not args.key:
        parser.error("--connect needs --key FILE: copy RUN/keys/generator.key from the host of the run")
    return args


async def generate(args: argparse.Namespace) -> None:
    """Join, fetch what is needed, work until told to leave."""
    from actors.engines import build_engine, engine_environment
    from actors.generator import Generator
    from actors.loop_watch import LoopWatch
    from actors.model_files import fetch_model_files
    from actors.scorer import Scorer
    from actors.snapshot_source import SnapshotSource
    from actors.tool_threads import ToolThreads

    asyncio.get_running_loop().set_default_executor(ToolThreads())
    addresses = Addresses.from_url(args.connect) if args.connect else Addresses.read(args.run_dir)
    key = read_client_key(args.key or args.run_dir / "keys" / "generator.key")
    own = settings.load(args.run_dir / "config.yaml") if args.run_dir else None
    uses = [function.use for function in own.all_rewards.functions] if own else [weighted(it)[0] for it in args.reward]
    reward_model = own.rewards.model.path if own else weighted(args.reward_model)[0]
    rollout_use = own.rollout.use if own else args.rollout
    scores_by, rolls_by = reward_digest(uses, reward_model), rollout_digest(rollout_use)
    incarnation = secrets.randbits(62)
    settings_digest = ""  # the run's, until there is an engine that was built by them

    def hello() -> Hello:
        return Hello(
            role=Role.GENERATOR.value,
            name=args.name,
            incarnation=incarnation,
            host=host_identity(),
            settings_digest=settings_digest,
            reward_digest=scores_by,
            rollout_digest=rolls_by,
        )

    try:
        session = await Session.open(addresses, key, hello, timeout_s=JOIN_S)
    except PeerTimeout as error:
        raise PeerTimeout(f"{error}; does the run go on at this address, and is the key file from it?") from None
    assert session.welcome is not None
    config = Config.model_validate(session.welcome.settings)
    settings_digest = config.result_digest()
    staging = private_folder(f"generator-{args.name.replace('/', '_')}")
    scorer = engine = watch = None
    farewell = "leaves"
    try:
        model = await fetch_model_files(session, staging / "model")
        device = args.device or config.run.device
        for name, value in engine_environment(config, device).items():
            os.environ.setdefault(name, value)
        loading = load_rollout(config, with_own_file(config.rollout, rollout_use), model)
        rollout = await _reported(loading, session, config, "loading the rollout")
        scorer = Scorer(config, with_files(config.all_rewards, uses, reward_model), model, device)
        await _reported(scorer.start(), session, config, "starting the rewards")
        building = asyncio.to_thread(build_engine, config, model, device, seed=incarnation & 0x7FFFFFFF)
        engine = await _reported(building, session, config)  # imports the engine's libraries
        await _reported(engine.start(), session, config)
        if rollout.code_file:
            watch = LoopWatch(rollout.name, rollout.code_file, config.rollout.timeout_s, _end_now)
        generator = Generator(
            session, engine, rollout, scorer, SnapshotSource(session, staging, config.watchdog.orphan_s), config
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, generator.leave)
        farewell = ""  # an error is a crash to the broker: the prompts that run may be its cause
        await generator.run()
        farewell = "leaves"
    finally:
        with contextlib.suppress(TetherError):
            await session.close(farewell)
        if watch is not None:
            watch.close()
        if engine is not None:
            await engine.close()
        if scorer is not None:
            await scorer.close()
        shutil.rmtree(staging, ignore_errors=True)


async def load_rollout(
    config: Config, rollout: RolloutConfig, model: Path, within_s: float = ROLLOUT_S
) -> RolloutRunner:
    """Its file may import anything. Raises ConfigError if it cannot be loaded, or not in time."""
    from actors.rollouts.runner import RolloutRunner

    try:
        async with asyncio.timeout(within_s):
            return await asyncio.to_thread(RolloutRunner, config, rollout, model)
    except TimeoutError:
        raise ConfigError(
            f"expected {rollout.use} to be imported within {within_s:g} s, it was not; does its file wait for "
            "something, or do its work, when it is imported?"
        ) from None


async def _reported(
    work: Coroutine[Any, Any, Outcome], session: Session, config: Config, state: str = "starting the engine"
) -> Outcome:
    """The outcome of `work`, which takes seconds to minutes: the broker hears meanwhile what takes so long."""
    task = asyncio.get_running_loop().create_task(work)
    started = asyncio.get_running_loop().time()
    while not task.done():
        for_s = asyncio.get_running_loop().time() - started
        await session.ask(Beat(state=state, for_s=for_s), timeout_s=config.watchdog.orphan_s)
        await asyncio.wait([task], timeout=config.watchdog.heartbeat_s)
    return await task


def _end_now(reason: str) -> None:
    """End a process whose event loop will not: its parts follow it, and the supervisor starts another."""
    log.error("%s; this process ends", reason)
    logging.shutdown()
    os._exit(Exit.ENGINE_STALLED)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    log_to_stderr(args.name)
    leave_with_parent(os.environ)
    try:
        asyncio.run(generate(args))
    except BaseExceptionGroup as group:
        return _report(_first(group))
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the last out of a task that a rollout started
        return _report(error)
    return int(Exit.DONE)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the work; what was cancelled because of it says nothing."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = next((inner for inner in error.exceptions if isinstance(inner, TetherError)), error.exceptions[0])
    return error


def _report(error: BaseException) -> int:
    if isinstance(error, TetherError):
        log.error("%s", error)
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return int(Exit.INTERRUPTED)
    log.critical("unexpected end", exc_info=error)
    return 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # engines leave threads behind that would hold the interpreter up
