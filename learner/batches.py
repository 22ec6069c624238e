"""Trajectories -> packed micro-batches under a token budget. Pure: numpy arrays in, tensors out.

Runs in every learner rank. Only tokens inside the loss get a place in the arrays of length K, so no logits are computed
for prompts, for what a tool said or for tokens that are left out. A sequence is never cut. A token without a finite
behavior log-probability is left out of the loss here and counted (`counts`).

Legend: T packed input tokens of a micro-batch, K tokens of it inside the loss, L tokens of one completion. A sequence's
last token predicts nothing, so it is a target but no input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.types import Completion, Logprobs, Share, Tokens

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence before it is packed."""

    prompt_tokens: Tokens  # at least one
    completion_tokens: Tokens  # [L]
    in_loss: Mask  # [L]
    behavior_logprobs: Logprobs  # [L]
    advantage: float
    versions: NDArray[np.int32]  # [L], policy version of each token

    def __post_init__(self) -> None:
        assert len(self.prompt_tokens), "the first token of a completion needs one before it"

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Places in the completion that are in the loss."""
        return np.flatnonzero(self.in_loss & np.isfinite(self.behavior_logprobs))

    @property
    def num_inputs(self) -> int:
        return len(self.prompt_tokens) + len(self.completion_tokens) - 1


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward pass sees: whole sequences in one row."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sequence
    cuts: tuple[int, ...]  # 0, ends of the sequences in T
    positions: Tensor  # [K] int64: the place in T that predicts the token
    targets: Tensor  # [K] int64
    behavior_logprobs: Tensor  # [K] float32
    advantages: Tensor  # [K] float32
    sequence_lengths: Tensor  # [K] float32: tokens inside the loss of the token's own sequence
    versions: Tensor  # [K] int32

    def to(self, device: torch.device) -> MicroBatch:
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def token_versions(completion: Completion) -> NDArray[np.int32]:
    """Policy version [L] of each token."""
    versions = np.empty(len(completion.tokens), dtype=np.int32)
    for span in completion.spans:
        versions[span.start : span.end] = span.version
    return versions


def share_rows(
    share: Share, advantages: NDArray[np.float32], left_out: Sequence[Mask | None] | None = None
) -> list[Row]:
    """Rows of a share: `advantages` [P, G] of the whole batch, `left_out` a mask [L] of tokens per item, or None."""
    rows = []
    for index, item in enumerate(share.items):
        completion = item.completion
        in_loss = (
            np.ones(len(completion.tokens), dtype=np.bool_) if completion.observed is None else ~completion.observed
        )
        mask = None if left_out is None else left_out[index]
        rows.append(
            Row(
                prompt_tokens=item.prompt_tokens,
                completion_tokens=completion.tokens,
                in_loss=in_loss if mask is None else in_loss & ~mask,
                behavior_logprobs=completion.behavior_logprobs,
                advantage=float(advantages[item.group, item.sample]),
                versions=token_versions(completion),
            )
        )
    return rows


def counts(rows: Sequence[Row]) -> dict[str, float]:
    """This rank's part of the batch's totals: what is in the loss, and what has no behavior log-probability."""
    return {
        "tokens": float(sum(len(row.kept) for row in rows)),
        "sequences": float(sum(len(row.kept) > 0 for row in rows)),
        "missing_logprobs": float(sum(int(row.in_loss.sum()) - len(row.kept) for row in rows)),
    }


def pack(rows: Sequence[Row], budget_tokens: int) -> list[MicroBatch]:
    """Micro-batches of at most `budget_tokens` inputs, first-fit decreasing; a longer row gets one alone.

    Depends on the rows and their order only. Rows without a token in the loss are dropped.
    """
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted((row for row in rows if len(row.kept)), key=lambda row: -row.num_inputs):
        place = next((i for i, left in enumerate(room) if row.num_inputs <= left), None)
        if place is None:
            bins.append([])
            room.append(budget_tokens)
            place = -1
        bins[place].append(row)
        room[place] -= row.num_inputs
    return [_packed(rows_of_bin) for rows_of_bin in bins]


def empty_micro_batch() -> MicroBatch:
    """One token through the model and none in the loss: what a rank runs while others have one micro-batch more."""
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        cuts=(0, 1),
        positions=torch.zeros(0, dtype=torch.int64),
        targets=torch.zeros(0, dtype=torch.int64),
        behavior_logprobs=torch.zeros(0),
        advantages=torch.zeros(0),
        sequence_lengths=torch.zeros(0),
        versions=torch.zeros(0, dtype=torch.int32),
    )


def _packed(rows: list[Row]) -> MicroBatch:
    starts = np.cumsum([0] + [row.num_inputs for row in rows])
    kept_counts = [len(row.kept) for row in rows]
    inputs = [np.concatenate([row.prompt_tokens, row.completion_tokens[:-1]]) for row in rows]
    positions = [start + len(row.prompt_tokens) - 1 + row.kept for start, row in zip(starts, rows, strict=False)]
    return MicroBatch(
        input_ids=_tensor(inputs, np.int64)[None],
        position_ids=_tensor([np.arange(row.num_inputs) for row in rows], np.int64)[None],
        cuts=tuple(int(cut) for cut in starts),
        positions=_tensor(positions, np.int64),
        targets=_tensor([row.completion_tokens[row.kept] for row in rows], np.int64),
        behavior_logprobs=_tensor([row.behavior_logprobs[row.kept] for row in rows], np.float32),
        advantages=_tensor([np.repeat([row.advantage for row in rows], kept_counts)], np.float32),
        sequence_lengths=_tensor([np.repeat(kept_counts, kept_counts)], np.float32),
        versions=_tensor([row.versions[row.kept] for row in rows], np.int32),
    )


def _tensor(parts: list[NDArray[np.generic]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))
