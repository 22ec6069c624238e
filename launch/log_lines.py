"""One log form for all processes: time, level, who, what. To stderr, which the supervisor sends to logs/<name>.log."""

from __future__ import annotations

import faulthandler
import logging
import signal


def log_to_stderr(name: str) -> None:
    """Also: SIGUSR1 writes the stacks of all threads, so that a hang can be looked at from outside."""
    form = f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
    for noisy in ("httpx", "filelock", "urllib3", "asyncio", "zmq.auth"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
