"""The policy's weights -> snapshots that generators load. Runs in every learner rank.

The learner stands still for `copy` alone; rank 0 calls `finish` from another thread, and a version may be announced
only after it. Under ZeRO 0 to 2 rank 0 writes; under ZeRO 3 every rank writes its slices into one file, so nothing is
gathered and the ranks must share a host. That no snapshot mixes two versions rests on `copy`: it returns on every rank
after all have written.
"""

from __future__ import annotations

from pathlib import Path

import torch

from learner.policy import Policy
from learner.ranks import Ranks
from learner.snapshot_ring import SnapshotRing, place_of
from protocol.weights import ITEM_BYTES, Snapshot, SnapshotWriter, lay_out


class Publisher:
    """Writes into `folder`; which snapshots stand there, and for how long: `SnapshotRing`."""

    def __init__(self, folder: Path, policy: Policy, ranks: Ranks) -> None:
        self._policy = policy
        self._ranks = ranks
        self._layout = lay_out(policy.layout())
        self._pending: tuple[int, SnapshotWriter] | None = None
        self._folder = folder
        self._ring = SnapshotRing(folder, self._layout) if ranks.is_first else None

    def copy(self, version: int) -> None:
        """Write the current weights aside; they may change as soon as this returns. Collective.

        Raises SnapshotError if there is no room.
        """
        assert self._pending is None, "finish() of the version before must come first"
        writer = self._ring.begin(version) if self._ring is not None else None
        self._ranks.barrier(f"make room for snapshot {version}")
        specs = {spec.name: spec for spec in self._layout}
        for name, start, elements in self._policy.owned():
            writer = writer or SnapshotWriter(place_of(self._folder, version), self._layout, create=False)
            first = start * ITEM_BYTES[specs[name].dtype]
            source = elements.view(torch.uint8)
            torch.from_numpy(writer.view(specs[name])[first : first + len(source)]).copy_(source)
        self._ranks.barrier(f"write snapshot {version}")
        if self._ranks.is_first:
            assert writer is not None
            self._pending = (version, writer)

    def finish(self) -> Snapshot:
        """Digest what `copy` wrote and give it its name. Rank 0, any thread; no collective."""
        assert self._pending is not None, "copy() comes first"
        version, writer = self._pending
        snapshot = writer.finish(version)
        self._pending = None
        return snapshot
