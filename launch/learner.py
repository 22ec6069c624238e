"""One learner rank, as torchrun, DeepSpeed's runner or launch/cluster.py start it: `launch/learner.py --run-dir RUN
[--resume]`.

Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them it is the only rank.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where a package would be a file

from launch.log_lines import log_to_stderr
from protocol import settings
from protocol.errors import Exit, TetherError
from protocol.parent import leave_with_parent

log = logging.getLogger("tether.learner")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with config.yaml, broker.json and keys/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that verifies")
    args = parser.parse_args(argv)
    name = f"learner-{os.environ.get('RANK', '0')}"
    log_to_stderr(name)
    leave_with_parent(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(int(Exit.INTERRUPTED)))  # checkpoints are whole or not there
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to handle
    try:
        config = settings.load(args.run_dir / "config.yaml")
        if config.run.evaluation_only:
            from learner.exhibit import evaluate

            return int(Exit.DONE if evaluate(config, args.run_dir) else Exit.INTERRUPTED)
        from learner.ranks import environment

        for key, value in environment(config.run.device).items():
            os.environ.setdefault(key, value)
        from learner.session import train

        ended = train(config, args.run_dir, resume=args.resume)
    except TetherError as error:
        log.error("%s", error)
        return int(error.exit_code)
    except Exception:  # ours to find: the process still has to end, whatever its threads wait for
        log.critical("unexpected end", exc_info=True)
        return 1
    return int(Exit.DONE if ended.complete else Exit.INTERRUPTED)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a rank that failed must not wait for its peers in an exit handler
