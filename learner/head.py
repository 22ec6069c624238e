"""Hidden states -> log-probabilities and entropies of the targets, without [K, V] logits ever standing in memory whole.

Runs in every learner rank, inside `PolicyModel.forward`. Logits exist for one chunk of tokens at a time, forward and
backward. What autograd would keep and add up for each chunk is written out here instead: the backward pass computes the
logits again, turns them into their own gradient in place, and adds each chunk's part to one gradient of the weight.
`bench/learner.py` measures what that takes.

Legend: K tokens, C tokens of a chunk, D hidden size, V vocabulary, p probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ChunkedHead(nn.Module):
    """Log-probabilities and entropies from hidden states.

    `entropy_gradient`: entropies have one too, which only an entropy bonus needs.
    """

    def __init__(self, lm_head: nn.Linear, chunk_tokens: int, entropy_gradient: bool) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.entropy_gradient = entropy_gradient
        self.__dict__["lm_head"] = lm_head  # a reference, no submodule: the model owns the weight

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden [K, D], targets [K] -> log-probabilities [K], entropies [K], both float32."""
        # the weight, no call of the module per chunk: under ZeRO-3 a call gathers, and ranks have unlike chunk counts
        weight = self.lm_head.weight
        return _Chunks.apply(hidden, weight, targets, temperature, self.chunk_tokens, self.entropy_gradient)


class _Chunks(torch.autograd.Function):
    """Of K tokens, C at a time: at most two tensors [C, V] in float32 in the forward pass, one in the backward pass.

    The backward pass has two as well where entropies have a gradient, and in bfloat16. The weight's gradient is added
    up in its own dtype, as autograd would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, normalizers, entropies = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device)
        for chunk in _slices(len(hidden), chunk_tokens):
            logits = _scaled_logits(hidden[chunk], weight, temperature)
            logprobs[chunk], normalizers[chunk], entropies[chunk] = _values(logits, targets[chunk])
            del logits  # else the next chunk's would be made beside it
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature, ctx.chunk_tokens, ctx.entropy_gradient = temperature, chunk_tokens, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the loss by logprobs [K] and entropies [K] -> those by hidden states and weight."""
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _slices(len(hidden), ctx.chunk_tokens):
            logits = _scaled_logits(hidden[chunk], weight, ctx.temperature)
            of_logits = _gradient(
                logits.sub_(normalizers[chunk, None]),
                targets[chunk],
                of_logprobs[chunk, None] / ctx.temperature,
                of_entropies[chunk, None] / ctx.temperature if ctx.entropy_gradient else None,
                entropies[chunk, None],
            ).to(weight.dtype)
            torch.mm(of_logits, weight, out=by_hidden[chunk])
            if by_weight is not None:
                by_weight.addmm_(of_logits.T, hidden[chunk])
            del logits, of_logits  # as in the forward pass
        return by_hidden, by_weight, None, None, None, None


def _slices(number: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, number, size)]


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[C, V] in float32; a tensor of its own, that may be written over."""
    return F.linear(hidden, weight).float().div_(temperature)


def _values(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, normalizers (log of the sum of exponentials) and entropies [C]; writes over the logits."""
    highest = logits.amax(-1)
    shifted = logits.sub_(highest[:, None])
    of_targets = shifted.gather(-1, targets[:, None])[:, 0]
    exponentials = shifted.exp()
    sums = exponentials.sum(-1)
    means = exponentials.mul_(shifted).sum(-1) / sums
    return of_targets - sums.log(), highest + sums.log(), sums.log() - means


def _gradient(
    all_logprobs: Tensor, targets: Tensor, of_logprobs: Tensor, of_entropies: Tensor | None, entropies: Tensor
) -> Tensor:
    """Gradient [C, V] of the loss by scaled logits z, written over ln p [C, V]; the others are [C, 1], targets [C].

    With target t and entropy H: d logprob / d z_j = [j = t] - p_j, and d H / d z_j = -p_j (ln p_j + H).
    """
    factors = of_logprobs
    if of_entropies is not None:
        factors = (all_logprobs + entropies).mul_(of_entropies).add_(of_logprobs)
    gradient = all_logprobs.exp_().mul_(factors).neg_()
    return gradient.scatter_add_(-1, targets[:, None], of_logprobs)
