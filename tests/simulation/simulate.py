"""Plays many simulated clusters on all cores: `make simulate`.

Schedules are numbered by their seeds, so that a run can be broken off and gone on with, and one that failed can be
played again alone. Exit codes: 0 all promises kept, 1 one was broken or an event never occurred, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from multiprocessing.pool import Pool

from tests.simulation.random_schedules import cluster_of, play
from tests.simulation.seen import Seen

CHUNK = 50  # schedules that a process plays before it reports
SHOWN_FAILURES = 10


def outcome(seed: int) -> tuple[int, Counter[str], str]:
    """(seed, what was seen, what broke): for another process, which gets no exception."""
    try:
        return seed, play(seed), ""
    except AssertionError as error:
        return seed, Counter(), str(error)


def play_all(first: int, count: int, pool: Pool) -> int:
    seen: Counter[str] = Counter()
    failures = 0
    started = time.monotonic()
    next_seed = first
    try:
        for seed, what, failure in pool.imap(outcome, range(first, first + count), CHUNK):
            next_seed = seed + 1
            seen += what
            failures += bool(failure)
            if failure and failures <= SHOWN_FAILURES:
                print(failure, flush=True)
            num_played = next_seed - first
            if num_played % 1000 == 0 or num_played == count:
                took_s = time.monotonic() - started
                print(f"{num_played} of {count} schedules, {failures} failed, {took_s:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"go on with: make simulate FIRST={next_seed}")
        return 130
    for kind in Seen:
        print(f"{seen[kind]:10d}  {kind}")
    missing = [kind.value for kind in Seen if not seen[kind]]
    if missing and count >= 2000:
        print(f"these never occurred: {'; '.join(missing)}")
    return int(failures > 0 or (bool(missing) and count >= 2000))


def play_one(seed: int) -> int:
    """One schedule, with everything there is to know of it."""
    cluster = cluster_of(seed)
    print(cluster.settings, cluster.load, sep="\n")
    try:
        cluster.run()
    except Exception:
        traceback.print_exc()
        return 1
    print(f"kept all promises in {cluster.now:.2f} s simulated, {len(cluster.trained)} prompts trained")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make simulate", description="Play simulated clusters, each a seed.")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first schedule (default 0)")
    parser.add_argument(
        "--count", type=int, default=20_000, metavar="N", help="how many (default 20000); 1: with details"
    )
    arguments = parser.parse_args()
    if arguments.count == 1:
        return play_one(arguments.first)
    deaf = (signal.SIGINT, signal.SIG_IGN)  # an interruption is this process's affair
    with get_context("spawn").Pool(os.cpu_count(), initializer=signal.signal, initargs=deaf) as pool:
        return play_all(arguments.first, arguments.count, pool)


if __name__ == "__main__":
    sys.exit(main())
