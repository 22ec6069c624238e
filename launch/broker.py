"""The broker: prompts out, trajectories in, batches on. Started by launch/cluster.py: `launch/broker.py --run-dir RUN`.

Imports no torch, so that it answers "who waits for what" while everything else hangs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where a package would be a file

from launch.log_lines import log_to_stderr
from protocol import settings
from protocol.addresses import Addresses, host_identity
from protocol.errors import Exit, TetherError
from protocol.keys import allowed_keys, read_server_key
from protocol.parent import leave_with_parent
from protocol.sockets import AllowList, bind_router, broker_context, self_test, start_authenticator

log = logging.getLogger("tether.broker")


def take_descriptors() -> None:
    """As many as this user may have: every peer holds two, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(run_dir: Path) -> None:
    """Bind, prove that strangers are refused, and serve until told to stop."""
    from broker.open_run import open_run
    from broker.server import Server
    from broker.service import Service

    config = settings.load(run_dir / "config.yaml")
    addresses = Addresses.read(run_dir)
    context = broker_context()
    allow = AllowList(allowed_keys(run_dir))
    authenticator = start_authenticator(context, allow)
    try:
        key = read_server_key(run_dir)
        control = bind_router(context, addresses.control, key, io_thread=0)
        bulk = bind_router(context, addresses.bulk, key, io_thread=1)
        for address in addresses:
            self_test(context, address, key)
        allow.num_strangers = 0  # those were ours
        server = Server(control, bulk, allow, Service(open_run(config, run_dir, host_identity())))
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        signal.signal(signal.SIGINT, lambda *_: server.stop())
        gc.freeze()  # what is here by now stays: every full collection would stop all peers for 30 ms to look at it
        log.info("serving at %s and %s", *addresses)
        server.run()
    finally:
        authenticator.stop()
        context.destroy(linger=200)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with config.yaml, broker.json and keys/")
    args = parser.parse_args(argv)
    log_to_stderr("broker")
    leave_with_parent(os.environ)
    take_descriptors()
    try:
        serve(args.run_dir)
    except TetherError as error:
        log.error("%s", error)
        return int(error.exit_code)
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
