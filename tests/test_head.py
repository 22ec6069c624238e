"""The chunked head against the plain formula over whole logits: values, gradients, chunks, dtypes and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.head import ChunkedHead

TOKENS, HIDDEN, VOCABULARY = 23, 12, 57
CHUNKS = (1, 8, 23, 100)


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[nn.Linear, Tensor, Tensor]:
    """Probabilities of targets from almost 0 to almost 1: every second target is the likeliest token."""
    torch.manual_seed(3)
    lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    nn.init.normal_(lm_head.weight, std=0.8)
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    targets[::2] = (hidden @ lm_head.weight.T).argmax(-1)[::2]
    return lm_head, hidden, targets


def plain(weight: Tensor, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """From whole logits, in float64."""
    all_logprobs = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return all_logprobs.gather(-1, targets[:, None])[:, 0], -(all_logprobs.exp() * all_logprobs).sum(-1)


def loss_of(logprobs: Tensor, entropies: Tensor, with_entropies: bool) -> Tensor:
    """Each token has a gradient of its own, of either sign; one has none."""
    factors = torch.linspace(-1.0, 1.2, len(logprobs)).to(logprobs.dtype)
    factors[:1] = 0.0
    loss = (logprobs * factors).sum()
    return loss + (entropies * factors.flip(0) ** 2).sum() if with_entropies else loss


def gradients(loss: Tensor, lm_head: nn.Linear, hidden: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (lm_head.weight, hidden))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_has_values_and_gradients_of_whole_logits(
    chunk: int, with_entropies: bool, temperature: float
) -> None:
    lm_head, hidden, targets = inputs()
    found = ChunkedHead(lm_head, chunk, with_entropies)(hidden, targets, temperature)
    wanted = plain(lm_head.weight, hidden, targets, temperature)
    assert wanted[0].min() < -8.0 < -0.2 < wanted[0].max(), "both ends of the scale are there"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-5)
    pairs = zip(
        gradients(loss_of(*found, with_entropies), lm_head, hidden),
        gradients(loss_of(*wanted, with_entropies), lm_head, hidden),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).norm() < 1e-6 * other.norm()


def test_the_gradient_is_that_of_small_steps() -> None:
    def values(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        lm_head.weight = nn.Parameter(weight)
        return plain(weight, hidden, targets, 0.7)

    lm_head, hidden, targets = inputs(torch.float64, tokens=4)
    assert torch.autograd.gradcheck(values, (hidden, lm_head.weight.detach().requires_grad_()))


def test_entropies_without_an_entropy_bonus_have_no_gradient() -> None:
    lm_head, hidden, targets = inputs()
    logprobs, entropies = ChunkedHead(lm_head, 8, False)(hidden, targets, 1.0)
    assert logprobs.requires_grad
    assert not entropies.requires_grad


def test_a_loss_of_entropies_alone_has_a_gradient() -> None:
    lm_head, hidden, targets = inputs()
    found = gradients(ChunkedHead(lm_head, 8, True)(hidden, targets, 1.0)[1].sum(), lm_head, hidden)
    wanted = gradients(plain(lm_head.weight, hidden, targets, 1.0)[1].sum(), lm_head, hidden)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_a_frozen_head_passes_the_gradient_on() -> None:
    lm_head, hidden, targets = inputs()
    (wanted,) = torch.autograd.grad(ChunkedHead(lm_head, 8, False)(hidden, targets, 1.0)[0].sum(), hidden)
    lm_head.requires_grad_(False)
    ChunkedHead(lm_head, 8, False)(hidden, targets, 1.0)[0].sum().backward()
    assert torch.equal(hidden.grad, wanted)
    assert lm_head.weight.grad is None


def test_no_tokens_have_a_gradient_of_zero() -> None:
    """What a rank needs that runs an empty micro-batch: backward is a collective, and every weight takes part."""
    lm_head, hidden, targets = inputs(tokens=0)
    logprobs, entropies = ChunkedHead(lm_head, 8, True)(hidden, targets, 1.0)
    assert logprobs.shape == entropies.shape == (0,)
    for gradient in gradients(logprobs.sum() + entropies.sum(), lm_head, hidden):
        assert not gradient.any()


def test_bfloat16_is_rounded_where_autograd_would_round_it() -> None:
    lm_head, hidden, targets = inputs(torch.bfloat16)
    logits = nn.functional.linear(hidden, lm_head.weight).float()
    logits.retain_grad()
    wanted = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    found, _ = ChunkedHead(lm_head, 100, False)(hidden, targets, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    ours, plainly = (gradients(loss_of(each, each, False), lm_head, hidden) for each in (found, wanted))
    for one, other in zip(ours, plainly, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).float().norm() < 2e-3 * other.float().norm()


@pytest.mark.parametrize("with_entropies", [False, True])
def test_logits_that_are_no_numbers_stay_visible(with_entropies: bool) -> None:
    lm_head, hidden, targets = inputs()
    with torch.no_grad():
        hidden[9] = torch.nan
    found = ChunkedHead(lm_head, 8, with_entropies)(hidden, targets, 1.0)
    for values in found:
        assert values.isnan().nonzero().flatten().tolist() == [9]
    assert all(gradient.isnan().any() for gradient in gradients(loss_of(*found, with_entropies), lm_head, hidden))


@pytest.mark.parametrize("with_entropies", [False, True])
def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_pass(with_entropies: bool) -> None:
    lm_head, hidden, targets = inputs()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Any:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ChunkedHead(lm_head, TOKENS, with_entropies)(hidden, targets, 1.0)
    assert sorted(kept) == sorted([hidden.numel(), lm_head.weight.numel(), TOKENS, TOKENS, TOKENS])
