"""Trajectories -> packed micro-batches under a token budget. Pure: numpy arrays in, tensors out.

Runs in every learner rank. Only tokens inside the loss get a place in the arrays of length K, so no logits are computed
for prompts, for what a tool said or for tokens that are left out. A sequence is never cut. A token without a finite
behavior log-probability is left out of the loss here and counted (`counts`). What a forward pass gives per packed token
goes back to the rows with `spread`.

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
Column = NDArray[np.float32]
UNKNOWN = np.float32(np.nan)  # a loss that reads what nobody computed is no number, and changes nothing


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence before it is packed. A column is [L]; None: not known yet, or not needed."""

    prompt_tokens: Tokens  # at least one
    completion_tokens: Tokens  # [L]
    in_loss: Mask  # [L]
    behavior_logprobs: Logprobs  # [L]
    versions: NDArray[np.int32]  # [L], policy version of each token
    place: int = 0  # of the completion in the whole batch: group * G + sample
    advantages: Column | None = None
    proximal_logprobs: Column | None = None
    reference_logprobs: Column | None = None
    values: Column | None = None
    returns: Column | None = None
    corrections: Column | None = None  # None: 1 for every token

    def __post_init__(self) -> None:
        assert len(self.prompt_tokens), "the first token of a completion needs one before it"

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Places in the completion that are in the loss."""
        return np.flatnonzero(self.in_loss & np.isfinite(self.behavior_logprobs))

    @property
    def kept_mask(self) -> Mask:
        """The same as a mask [L]."""
        mask = np.zeros(len(self.completion_tokens), np.bool_)
        mask[self.kept] = True
        return mask

    @property
    def num_inputs(self) -> int:
        return len(self.prompt_tokens) + len(self.completion_tokens) - 1


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward pass sees: whole sequences in one row."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sequence
    cuts: tuple[int, ...]  # 0, ends of the sequences in T
    rows: tuple[int, ...]  # of each sequence, its place in the list that was packed
    num_sequences: int
    positions: Tensor  # [K] int64: the place in T that predicts the token
    targets: Tensor  # [K] int64
    sequence_ids: Tensor  # [K] int64, 0 .. num_sequences - 1
    sequence_lengths: Tensor  # [K] float32: tokens inside the loss of the token's own sequence
    versions: Tensor  # [K] int32
    behavior_logprobs: Tensor  # [K] float32, as all that follow; NaN where nobody computed it
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    corrections: Tensor  # weight of the token's policy loss; 0 leaves it out, but not out of the denominator

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


def share_rows(share: Share, left_out: Sequence[Mask | None]) -> list[Row]:
    """Rows of a share; `left_out` has a mask [L] of tokens per item, or None."""
    rows = []
    for item, mask in zip(share.items, left_out, strict=True):
        completion = item.completion
        in_loss = (
            np.ones(len(completion.tokens), dtype=np.bool_) if completion.observed is None else ~completion.observed
        )
        rows.append(
            Row(
                prompt_tokens=item.prompt_tokens,
                completion_tokens=completion.tokens,
                in_loss=in_loss if mask is None else in_loss & ~mask,
                behavior_logprobs=completion.behavior_logprobs,
                versions=token_versions(completion),
                place=item.group * share.rewards.shape[1] + item.sample,
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
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted((i for i, row in enumerate(rows) if len(row.kept)), key=lambda i: -rows[i].num_inputs):
        size = rows[index].num_inputs
        place = next((i for i, left in enumerate(room) if size <= left), None)
        if place is None:
            bins.append([])
            room.append(budget_tokens)
            place = -1
        bins[place].append(index)
        room[place] -= size
    return [_packed(rows, tuple(indices)) for indices in bins]


def empty_micro_batch() -> MicroBatch:
    """One token through the model and none in the loss: what a rank runs while others have one micro-batch more."""
    whole, real = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        cuts=(0, 1),
        rows=(),
        num_sequences=0,
        positions=whole,
        targets=whole,
        sequence_ids=whole,
        sequence_lengths=real,
        versions=torch.zeros(0, dtype=torch.int32),
        behavior_logprobs=real,
        **dict.fromkeys(COLUMNS, real),
    )


def spread(
    rows: Sequence[Row], micro_batches: Sequence[MicroBatch], per_token: Sequence[NDArray[np.float32]]
) -> list[Column]:
    """What each micro-batch gave [K], as one column [L] per row; NaN for tokens outside the loss."""
    columns = [np.full(len(row.completion_tokens), UNKNOWN) for row in rows]
    for batch, values in zip(micro_batches, per_token, strict=True):
        start = 0
        for index in batch.rows:
            kept = rows[index].kept
            columns[index][kept] = values[start : start + len(kept)]
            start += len(kept)
        assert start == len(values), f"{start} tokens in the loss of the rows, {len(values)} values"
    return columns


COLUMNS = ("proximal_logprobs", "reference_logprobs", "advantages", "values", "returns", "corrections")


def _packed(all_rows: Sequence[Row], indices: tuple[int, ...]) -> MicroBatch:
    rows = [all_rows[index] for index in indices]
    starts = np.cumsum([0] + [row.num_inputs for row in rows])
    kept_counts = [len(row.kept) for row in rows]
    inputs = [np.concatenate([row.prompt_tokens, row.completion_tokens[:-1]]) for row in rows]
    positions = [start + len(row.prompt_tokens) - 1 + row.kept for start, row in zip(starts, rows, strict=False)]
    return MicroBatch(
        input_ids=_tensor(inputs, np.int64)[None],
        position_ids=_tensor([np.arange(row.num_inputs) for row in rows], np.int64)[None],
        cuts=tuple(int(cut) for cut in starts),
        rows=indices,
        num_sequences=len(rows),
        positions=_tensor(positions, np.int64),
        targets=_tensor([row.completion_tokens[row.kept] for row in rows], np.int64),
        sequence_ids=_tensor([np.repeat(np.arange(len(rows)), kept_counts)], np.int64),
        sequence_lengths=_tensor([np.repeat(kept_counts, kept_counts)], np.float32),
        versions=_tensor([row.versions[row.kept] for row in rows], np.int32),
        behavior_logprobs=_tensor([row.behavior_logprobs[row.kept] for row in rows], np.float32),
        **{name: _tensor([_column(row, name) for row in rows], np.float32) for name in COLUMNS},
    )


def _column(row: Row, name: str) -> Column:
    """What is known of the row's tokens in the loss."""
    column: Column | None = getattr(row, name)
    if column is None:
        return np.full(len(row.kept), 1.0 if name == "corrections" else UNKNOWN, dtype=np.float32)
    return column[row.kept]


def _tensor(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))
