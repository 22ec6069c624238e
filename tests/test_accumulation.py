"""Every loss with every aggregation gives the weights one gradient, however its batch is cut, packed and accumulated.

With KL, entropy bonus and corrections in it. The ranks of `tests/prepared.py` hold some of them over gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.aggregation import Aggregation
from learner.batches import MicroBatch, Row, empty_micro_batch, pack
from learner.losses import PolicyLoss
from learner.model import PolicyModel, load
from protocol.algorithm import AlgorithmConfig, KlConfig
from tests.learning import model_folder, sampled_batch
from tests.loss_outcomes import MAX_TOKENS, in_double, totals

KL = KlConfig(coef=0.05, with_ratio=True)
SAME = 1e-5  # relative; the logits are float32


class Pass(NamedTuple):
    """A forward pass of one micro-batch."""

    logprobs: Tensor  # [K]
    entropies: Tensor  # [K]
    batch: MicroBatch


class Cut(NamedTuple):
    """The micro-batches of all ranks, and the weights that computed them."""

    passes: list[Pass]
    weights: list[Tensor]

    def gradient(self, loss: PolicyLoss) -> tuple[float, Tensor]:
        """The loss, and its gradient by all weights as one vector, added up over micro-batches."""
        total = torch.stack([loss(*one)[0] for one in self.passes]).sum()
        parts = torch.autograd.grad(total, self.weights, retain_graph=True)
        return total.item(), torch.cat([part.flatten() for part in parts])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    """A model's path, and rows with all that a loss reads; ratios lie on both sides of the bounds."""
    model = model_folder(tmp_path_factory.mktemp("model"), tied=False)
    rng, found = np.random.default_rng(3), []
    for row in sampled_batch(model):
        assert row.proximal_logprobs is not None
        moved = [row.proximal_logprobs + rng.normal(0.0, 0.3, len(row.in_loss)).astype(np.float32) for _ in range(2)]
        found.append(replace(row, behavior_logprobs=moved[0], reference_logprobs=moved[1]))
    return model, found


@pytest.fixture(scope="module")
def cuts(rows: tuple[str, list[Row]]) -> list[Cut]:
    """All in one; some packed; and shares of three ranks: two sequences, one each; the others; and nothing."""
    path, batch = rows
    shares = [pack(batch, 10_000), pack(batch, 64), [*pack(batch[:2], 1), *pack(batch[2:], 40), empty_micro_batch()]]
    assert len({len(share) for share in shares}) == len(shares), "unlike numbers of micro-batches"
    return [_forward(path, share) for share in shares]


def _forward(path: str, micro_batches: Sequence[MicroBatch]) -> Cut:
    lm = load(path, torch.float64, torch.device("cpu"), trust_remote_code=False)
    model = PolicyModel(lm, 16, gradient_checkpointing=False, entropy_gradient=True)
    passes = []
    for batch in micro_batches:
        seen = model(batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, 1.0)
        passes.append(Pass(*(values.double() for values in seen), in_double(batch)))
    return Cut(passes, list(lm.parameters()))


@pytest.mark.parametrize("aggregation", get_args(AlgorithmConfig.model_fields["aggregation"].annotation))
@pytest.mark.parametrize("family", get_args(AlgorithmConfig.model_fields["loss"].annotation))
def test_no_cut_changes_loss_or_gradient(
    family: str, aggregation: str, rows: tuple[str, list[Row]], cuts: list[Cut]
) -> None:
    settings = AlgorithmConfig.model_validate(
        {"loss": family, "aggregation": aggregation, "dual_clip": 1.5, "entropy_coef": 0.01}
    )
    loss = PolicyLoss(settings, KL, KL.coef, Aggregation(settings, MAX_TOKENS, totals(rows[1])))
    (wanted, gradient), *others = [cut.gradient(loss) for cut in cuts]
    assert gradient.norm() > 0
    for got, other in others:
        assert got == pytest.approx(wanted, rel=SAME)
        assert (other - gradient).norm() < SAME * gradient.norm()
