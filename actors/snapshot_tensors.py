"""A snapshot's bytes as torch tensors. Used in the transformers engine and inside vLLM's worker."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from protocol.weights import Snapshot

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def snapshot_tensors(snapshot: Snapshot) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) over the mapped file, without a copy; each tensor keeps the mapping alive."""
    for spec in snapshot.manifest.tensors:
        data = torch.from_numpy(snapshot.view(spec))
        yield spec.name, data.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
