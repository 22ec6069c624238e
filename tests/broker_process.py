"""`launch/broker.py` as a process of its own, and what can be seen of it from outside: its log, memory, descriptors."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from protocol.config import Config
from tests.small_run import make_run
from tests.wire import wait_until

ROOT = Path(__file__).resolve().parents[1]


def run_on_disk(folder: Path, **sections: object) -> Config:
    """A run folder that a broker process can open."""
    config = make_run(folder, **sections)  # type: ignore[arg-type]
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config


class BrokerProcess:
    """The broker of a run folder, from `with` to its end; killed there if it still runs."""

    def __init__(self, folder: Path, max_descriptors: int | None = None) -> None:
        self._folder, self._max_descriptors = folder, max_descriptors

    def __enter__(self) -> BrokerProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "launch" / "broker.py"), "--run-dir", str(self._folder)]
        self._log_path = self._folder / f"broker-{id(self)}.log"
        with self._log_path.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, stderr=file)
        if self._max_descriptors is not None:
            limits = (self._max_descriptors, self._max_descriptors)
            resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, limits)
        self._seen = psutil.Process(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def serves(self) -> None:
        """Wait until it listens."""
        wait_until(lambda: "serving at" in self.log or self._process.poll() is not None, "the broker's start")
        assert self._process.poll() is None, self.log

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def rss_bytes(self) -> int:
        return int(self._seen.memory_info().rss)

    @property
    def peak_rss_bytes(self) -> int:
        """The most that it ever was."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    @property
    def own_bytes(self) -> int:
        """Resident memory that is its own: without its program, and without the snapshots it maps."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    @property
    def num_descriptors(self) -> int:
        return self._seen.num_fds()

    def kill(self) -> None:
        """At once, as a crash does."""
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> int:
        """In order; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, within_s: float = 30.0) -> int:
        """The exit code."""
        return self._process.wait(within_s)
