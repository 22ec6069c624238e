"""Snapshots: one version of the policy's weights as a folder with one flat file and its manifest.

Owns the manifest's bytes and their meaning; who may read or write the folder: protocol/snapshot_file.py. The learner
writes snapshots, the broker serves their chunks, generators map them or pull them chunk by chunk. A snapshot never
changes while it has its name: `SnapshotWriter` and `SnapshotAssembly` work in `<folder>.part` and rename it. Its
identity is `Manifest.digest`: version numbers repeat after a resume. That a peer's chunk is what the learner wrote
rests on `Manifest.check_chunk`; that a manifest cannot point outside its file rests on `Manifest.from_bytes`.

A snapshot of adapters names its base: the digest of the snapshot whose weights they stand beside. A base has none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protocol.errors import SnapshotError
from protocol.snapshot_file import WEIGHTS_FILE, Bytes, SnapshotPart, read_folder

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ALIGNMENT_BYTES = 64
CHUNK_BYTES = 4 << 20
MAX_MANIFEST_BYTES = 4 << 20
FORMAT = 1
DIGEST = re.compile("[0-9a-f]{64}")


class TensorSpec(NamedTuple):
    """Where one parameter lies in the flat file; `name` as in a Hugging Face checkpoint."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    offset: int  # multiple of ALIGNMENT_BYTES
    nbytes: int


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Give each (name, dtype, shape) its place in a flat file, in the order given."""
    specs: list[TensorSpec] = []
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in ITEM_BYTES:
            raise SnapshotError(f"dtype of {name} must be one of {', '.join(ITEM_BYTES)}, got {dtype}")
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        specs.append(TensorSpec(name, dtype, tuple(shape), offset, prod(shape) * ITEM_BYTES[dtype]))
        end = offset + specs[-1].nbytes
    return tuple(specs)


@dataclass(frozen=True)
class Manifest:
    """What lies where in the flat file, and the sha256 of each of its chunks."""

    tensors: tuple[TensorSpec, ...]
    chunk_digests: tuple[str, ...]  # hex
    chunk_bytes: int = CHUNK_BYTES  # of every chunk but the last
    base: str = ""  # digest of the snapshot that these adapters stand beside; "": these are whole weights

    @property
    def total_bytes(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].nbytes

    @cached_property
    def digest(self) -> str:
        """Root digest, hex: the identity of these weights."""
        return _sha256(self.to_bytes())

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Bytes [start, end) of a chunk in the flat file."""
        if not 0 <= index < len(self.chunk_digests):
            raise SnapshotError(f"chunk must be below {len(self.chunk_digests)}, got {index}")
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.total_bytes)

    def check_chunk(self, index: int, data: bytes | Bytes) -> None:
        """Raise SnapshotError unless `data` is the chunk that the manifest's writer digested."""
        start, end = self.chunk_range(index)
        if len(data) != end - start:
            raise SnapshotError(f"chunk {index} has {end - start} bytes, got {len(data)}")
        if _sha256(data) != self.chunk_digests[index]:
            raise SnapshotError(f"chunk {index} of snapshot {self.digest[:12]} does not match its digest")

    def to_bytes(self) -> bytes:
        """The canonical form: equal manifests have equal bytes."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "chunk_bytes": self.chunk_bytes,
            "tensors": [[s.name, s.dtype, list(s.shape), s.offset, s.nbytes] for s in self.tensors],
            "chunks": list(self.chunk_digests),
        } | ({"base": self.base} if self.base else {})
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest that a peer may have written. Raises SnapshotError unless every field holds together."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise SnapshotError(f"a manifest has at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise SnapshotError(f"manifest format {FORMAT} expected, got {fields['format']}")
            tensors = tuple(_checked_spec(*row) for row in fields["tensors"])
            manifest = cls(tensors, tuple(fields["chunks"]), fields["chunk_bytes"], fields.get("base", ""))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SnapshotError(f"not a manifest: {type(error).__name__}: {error}") from error
        manifest._check()
        if manifest.to_bytes() != data:
            raise SnapshotError("the manifest is not in canonical form")
        return manifest

    def _check(self) -> None:
        if not self.tensors or len({s.name for s in self.tensors}) != len(self.tensors):
            raise SnapshotError("a manifest names at least one tensor, and none twice")
        if self.tensors != lay_out((s.name, s.dtype, s.shape) for s in self.tensors):
            raise SnapshotError("tensors of a manifest must follow each other in the flat file without overlap or gap")
        if not _is_int(self.chunk_bytes) or not 1 << 20 <= self.chunk_bytes <= CHUNK_BYTES:
            raise SnapshotError(f"chunk_bytes must be between {1 << 20} and {CHUNK_BYTES}, got {self.chunk_bytes}")
        if len(self.chunk_digests) != -(-self.total_bytes // self.chunk_bytes):
            raise SnapshotError(f"{self.total_bytes} bytes do not make {len(self.chunk_digests)} chunks")
        if not all(isinstance(d, str) and len(d) == 64 for d in self.chunk_digests):
            raise SnapshotError("a chunk digest is 64 hex digits")
        if not isinstance(self.base, str) or not DIGEST.fullmatch(self.base or "0" * 64):
            raise SnapshotError(f"a base is named by the 64 hex digits of its digest, got {self.base!r:.80}")


def _sha256(data: bytes | Bytes) -> str:
    return hashlib.sha256(memoryview(data)).hexdigest()  # type: ignore[arg-type]  # numpy's arrays are buffers


def _is_int(value: Any) -> bool:
    return type(value) is int


def _checked_spec(name: Any, dtype: Any, shape: Any, offset: Any, nbytes: Any) -> TensorSpec:
    if not (isinstance(name, str) and name and isinstance(dtype, str) and isinstance(shape, list)):
        raise SnapshotError(f"a tensor has a name, a dtype and a shape, got {name!r}, {dtype!r}, {shape!r}")
    if not all(_is_int(n) and n > 0 for n in shape) or not (_is_int(offset) and _is_int(nbytes)):
        raise SnapshotError(f"shape, offset and nbytes of {name} must be whole numbers, got {(shape, offset, nbytes)}")
    return TensorSpec(name, dtype, tuple(shape), offset, nbytes)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A complete snapshot on this host. It is neither changed nor removed while a view of its data lives."""

    folder: Path
    version: int
    manifest: Manifest
    data: Bytes  # the flat file, mapped
    base: Snapshot | None = None  # of adapters: what they stand beside, for who does not hold it yet

    @classmethod
    def open(cls, folder: Path, version: int) -> Snapshot:
        """Map the weights; they are not touched. Raises SnapshotError if anything is missing or is being written."""
        try:
            manifest, data = read_folder(folder)
        except BlockingIOError:
            raise SnapshotError(f"no snapshot at {folder}: its file is being written over with a later one") from None
        except OSError as error:
            raise SnapshotError(f"no snapshot at {folder}: {error.strerror}") from error
        snapshot = cls(folder, version, Manifest.from_bytes(manifest), data)
        snapshot.check_size()
        return snapshot

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def check_size(self) -> None:
        """Raise SnapshotError unless the flat file has its full length: reading past its end kills a process."""
        path = self.folder / WEIGHTS_FILE
        try:
            size = path.stat().st_size
        except OSError as error:
            raise SnapshotError(f"snapshot {self.version} is gone: {path}: {error.strerror}") from error
        if size != self.manifest.total_bytes:
            raise SnapshotError(f"{path} must have {self.manifest.total_bytes} bytes, has {size}")

    def view(self, spec: TensorSpec) -> Bytes:
        """The bytes of one tensor, little-endian, row-major."""
        return self.data[spec.offset : spec.offset + spec.nbytes]

    def chunk(self, index: int) -> Bytes:
        start, end = self.manifest.chunk_range(index)
        return self.data[start:end]

    def verify(self) -> None:
        """Digest every chunk. Raises SnapshotError on the first that differs."""
        for index in range(len(self.manifest.chunk_digests)):
            self.manifest.check_chunk(index, self.chunk(index))


class SnapshotWriter:
    """Writes snapshots from tensors: fill every `view`, then `finish`. Other processes may help (`create=False`).

    What was finished can be written over with a later version: `take_back`, then `rename` or `discard`.
    """

    def __init__(self, folder: Path, layout: tuple[TensorSpec, ...], create: bool = True) -> None:
        self._layout = layout
        self._part = SnapshotPart(folder, layout[-1].offset + layout[-1].nbytes, create)
        self.take_back, self.rename, self.discard = self._part.take_back, self._part.rename, self._part.discard

    @property
    def folder(self) -> Path:
        """The name that it has, or will have."""
        return self._part.folder

    def view(self, spec: TensorSpec) -> Bytes:
        """The writable bytes of one tensor."""
        return self._part.data[spec.offset : spec.offset + spec.nbytes]

    def finish(self, version: int, base: Snapshot | None = None) -> Snapshot:
        """Digest the file (about a second per gigabyte) and name the folder. One process does this, after all wrote.

        `base`: what was written are adapters that stand beside it.
        """
        data = self._part.data
        starts = range(0, len(data), CHUNK_BYTES)
        digests = tuple(_sha256(data[start : start + CHUNK_BYTES]) for start in starts)
        manifest = Manifest(self._layout, digests, CHUNK_BYTES, base.digest if base else "")
        return replace(Snapshot.open(self._part.publish(manifest.to_bytes()), version), base=base)


class SnapshotAssembly:
    """Puts a snapshot together from chunks of another host, in any order, over as many connections as it takes."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._part = SnapshotPart(folder, manifest.total_bytes, create=True)
        self.missing = set(range(len(manifest.chunk_digests)))
        self.discard = self._part.discard

    def put(self, index: int, data: bytes | Bytes) -> None:
        """Verify and keep one chunk. Raises SnapshotError when it is not what the manifest says."""
        self.manifest.check_chunk(index, data)
        start, end = self.manifest.chunk_range(index)
        self._part.data[start:end] = np.frombuffer(data, dtype=np.uint8)
        self.missing.discard(index)

    def finish(self, version: int) -> Snapshot:
        assert not self.missing, f"{len(self.missing)} chunks have not come yet"
        return Snapshot.open(self._part.publish(self.manifest.to_bytes()), version)
