"""Who waits for what, since when: asks the broker of a run.

python tools/status.py RUN [--json] [--watch]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from launch.broker_line import ASK_EVERY_S, BrokerLine
from launch.console import Console, open_screen
from protocol.errors import Exit, TetherError
from protocol.settings import load


async def show(run_dir: Path, as_json: bool, watch: bool) -> None:
    """Show one status, or with `watch` every second's until Ctrl-C. Raises TetherError if the broker is silent."""
    broker = BrokerLine(run_dir, "status", lambda status: None)
    console = Console(load(run_dir / "config.yaml"), run_dir, open_screen())
    if watch and not as_json:
        console.start()
    try:
        while True:
            status = await broker.status()
            console.answered(status)
            if as_json:
                print(json.dumps(status), flush=True)
            elif watch:
                console.update(())
            else:
                console.print_once()
            if not watch:
                return
            await asyncio.sleep(ASK_EVERY_S)
    finally:
        console.close()
        await broker.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that goes on")
    parser.add_argument("--json", action="store_true", help="the broker's answer as it is")
    parser.add_argument("--watch", action="store_true", help="again every second")
    args = parser.parse_args(argv)
    try:
        asyncio.run(show(args.run, args.json, args.watch))
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        pass
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
