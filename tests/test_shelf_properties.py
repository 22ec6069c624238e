"""Readers, a learner that writes its files over, and the shelf between them, in every order: no chunk ever lies."""

from __future__ import annotations

import fcntl
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.shelf import KEPT, Shelf
from learner.snapshot_ring import SnapshotRing
from protocol.errors import SnapshotError
from protocol.messages import Publish
from protocol.snapshot_file import WEIGHTS_FILE, Bytes
from protocol.weights import Manifest, lay_out

LAYOUT = lay_out([("w", "float32", (16,))])
READERS = (1, 2, 3)
LIMIT_S = 10.0


class ShelfMachine(RuleBasedStateMachine):
    """The books here: who pulls what since when, and which versions the rule lets them finish."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.ring = SnapshotRing(self.folder / "snapshots", LAYOUT)
        self.shelf = Shelf()
        self.now = 0.0
        self.manifests: list[Manifest] = []  # by version
        self.held: set[int] = set()  # versions that somebody pulls and may finish
        self.pulls: dict[int, tuple[int, float]] = {}  # reader -> version, when it last asked
        self.publish(lead=0)

    @property
    def newest(self) -> int:
        return len(self.manifests) - 1

    @rule(lead=st.integers(0, 3))
    def publish(self, lead: int) -> None:
        """The next version; leases are no longer given to who holds one more than `lead` behind it."""
        version = len(self.manifests)
        writer = self.ring.begin(version)
        writer.view(LAYOUT[0])[:] = np.random.default_rng(version).integers(0, 256, LAYOUT[0].nbytes, np.uint8)
        made = writer.finish(version)
        self.manifests.append(made.manifest)
        told = Publish(
            version=version, digest=made.digest, manifest=made.manifest.to_bytes(), path=str(made.folder), host="here"
        )
        del made  # the learner does not read it
        self.shelf.put(told, oldest_useful=version - lead)
        self.held = set(sorted(held for held in self.held if held >= version - lead)[:1])

    @rule(seed=st.integers(0, 1 << 32))
    def readers_ask(self, seed: int) -> None:
        """Mostly for more of what they pull, sometimes for another version."""
        chance = random.Random(seed)
        for _ in range(5):
            reader, version = chance.choice(READERS), max(0, self.newest - chance.choice([0, 0, 1, 2]))
            if reader in self.pulls and chance.random() < 0.7:
                version = self.pulls[reader][0]
            self._ask_for_a_chunk(reader, version)

    def _ask_for_a_chunk(self, reader: int, version: int) -> None:
        manifest = self.manifests[version]
        is_shelved = self.newest - version < KEPT and self._stands(version)
        others = self.held - {self.newest, version}
        can_be_had = version in self.held or version == self.newest or (is_shelved and not others)
        chunk = self._chunk(manifest.digest, reader)
        assert (chunk is not None) == can_be_had, f"version {version} of {self.newest}, {self.held} are held"
        if chunk is not None:
            manifest.check_chunk(0, chunk)
            self.held.add(version)
            self.pulls[reader] = version, self.now
            del chunk  # a view holds the file as long as it lives
            self._tick()

    def _chunk(self, digest: str, reader: int) -> Bytes | None:
        try:
            return self.shelf.chunk(digest, 0, reader, self.now)
        except SnapshotError:
            return None

    def _stands(self, version: int) -> bool:
        return (self.folder / "snapshots" / f"v{version}").is_dir()

    @rule(reader=st.sampled_from(READERS))
    def a_reader_is_done(self, reader: int) -> None:
        self.shelf.ended(reader)
        self.pulls.pop(reader, None)
        self._forget()

    @rule(delay_s=st.sampled_from([1.0, LIMIT_S / 2, LIMIT_S * 2]))
    def time_passes(self, delay_s: float) -> None:
        self.now += delay_s
        self._tick()

    def _tick(self) -> None:
        self.shelf.expire(self.now, LIMIT_S)
        self.pulls = {reader: pull for reader, pull in self.pulls.items() if self.now - pull[1] <= LIMIT_S}
        self._forget()

    def _forget(self) -> None:
        self.held &= {version for version, _ in self.pulls.values()}

    @invariant()
    def a_file_is_held_exactly_while_somebody_may_finish_it(self) -> None:
        if hasattr(self, "shelf"):
            standing = {int(place.name[1:]) for place in (self.folder / "snapshots").iterdir()}
            assert {version for version in standing if self._is_mapped(version)} == self.held
            assert len(standing) <= 3, f"{standing} stand in memory"
            assert self.newest in standing

    def _is_mapped(self, version: int) -> bool:
        with open(self.folder / "snapshots" / f"v{version}" / WEIGHTS_FILE, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestShelfMachine = ShelfMachine.TestCase
TestShelfMachine.settings = settings(max_examples=30, stateful_step_count=40)
