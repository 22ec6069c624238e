"""The policy's weights -> snapshots that generators load. Runs in every learner rank.

The learner stands still for `copy` alone; rank 0 calls `finish` from another thread, and a version may be announced
only after it. Under ZeRO 0 to 2 rank 0 writes; under ZeRO 3 every rank writes its slices into one file, so nothing is
gathered and the ranks must share a host. That no snapshot mixes two versions rests on `copy`: it returns on every rank
after all have written.

With adapters a version is the adapters alone; the base that they stand beside is written with the first one, into a
file that stays as long as the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from learner.policy import Policy
from learner.ranks import Ranks
from learner.snapshot_ring import SnapshotRing, place_of
from protocol.weights import ITEM_BYTES, Snapshot, SnapshotWriter, TensorSpec, lay_out

BASE = "base"  # its folder, beside those of versions

Layout = tuple[TensorSpec, ...]
Owned = tuple[str, int, Tensor]  # as `Policy.owned`


class Publisher:
    """Writes into `folder`; which snapshots stand there, and for how long: `SnapshotRing`."""

    def __init__(self, folder: Path, policy: Policy, ranks: Ranks) -> None:
        self._policy = policy
        self._ranks = ranks
        self._layout = lay_out(policy.layout())
        self._pending: tuple[int, SnapshotWriter] | None = None
        self._pending_base: SnapshotWriter | None = None
        self._base: Snapshot | None = None
        self._base_is_written = policy.base is None
        self._folder = folder
        self._ring = SnapshotRing(folder, self._layout) if ranks.is_first else None

    def copy(self, version: int) -> None:
        """Write the current weights aside; they may change as soon as this returns. Collective.

        Raises SnapshotError if there is no room.
        """
        assert self._pending is None, "finish() of the version before must come first"
        writer = self._ring.begin(version) if self._ring is not None else None
        if not self._base_is_written:
            self._copy_base()
        self._ranks.barrier(f"make room for snapshot {version}")
        self._fill(writer, place_of(self._folder, version), self._layout, self._policy.owned())
        self._ranks.barrier(f"write snapshot {version}")
        if self._ranks.is_first:
            assert writer is not None
            self._pending = (version, writer)

    def _copy_base(self) -> None:
        base = self._policy.base
        assert base is not None
        place, layout = self._folder / BASE, lay_out(base.layout())
        writer = self._pending_base = SnapshotWriter(place, layout) if self._ranks.is_first else None
        self._ranks.barrier("make room for the base")
        self._fill(writer, place, layout, base.owned())
        self._base_is_written = True

    @staticmethod
    def _fill(writer: SnapshotWriter | None, place: Path, layout: Layout, owned: Iterator[Owned]) -> None:
        """Write this rank's elements; `writer` None: another rank has made the file."""
        specs = {spec.name: spec for spec in layout}
        for name, start, elements in owned:
            writer = writer or SnapshotWriter(place, layout, create=False)
            first = start * ITEM_BYTES[specs[name].dtype]
            source = elements.view(torch.uint8)
            torch.from_numpy(writer.view(specs[name])[first : first + len(source)]).copy_(source)

    def finish(self) -> Snapshot:
        """Digest what `copy` wrote and give it its name. Rank 0, any thread; no collective."""
        assert self._pending is not None, "copy() comes first"
        if self._pending_base is not None:
            self._base = self._pending_base.finish(version=0)
            self._pending_base = None
        version, writer = self._pending
        snapshot = writer.finish(version, self._base)
        self._pending = None
        return snapshot
