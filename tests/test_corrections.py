"""Off-policy weights against scalar derivations, on both sides of each bound and mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from learner.corrections import Corrections, corrections
from protocol.algorithm import CorrectionsConfig

LOW, HIGH = 0.5, 2.0
# log ratios of tokens by sequence; tokens on both sides of both bounds and of both clamps, and sequences whose product
# and whose geometric mean are inside, below and above, not always together
SEQUENCES = [
    [0.0],
    [math.log(1.99), math.log(2.01), math.log(0.51), math.log(0.49)],
    [0.3, 0.4, 0.2],
    [-0.3, -0.4, -0.2],
    [0.9, 0.8],
    [-0.9, -0.8],
    [25.0, -1.0],
    [-25.0, 1.0, 0.5],
]
ADVANTAGES = [-1.0, 1.0, -0.5, -0.5, 0.7, -0.7, -2.0, 0.0]


def packed(sequences: list[list[float]], advantages: list[list[float]]) -> dict[str, Any]:
    """The tensors of `corrections`, in float64."""
    log_ratios = torch.tensor([x for sequence in sequences for x in sequence], dtype=torch.float64)
    proximal = -2.0 + 0.1 * torch.arange(len(log_ratios), dtype=torch.float64)
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    return {
        "behavior_logprobs": proximal - log_ratios,
        "proximal_logprobs": proximal,
        "advantages": torch.tensor([x for of_sequence in advantages for x in of_sequence], dtype=torch.float64),
        "sequence_ids": torch.arange(len(sequences)).repeat_interleave(lengths),
        "num_sequences": len(sequences),
    }


def example() -> dict[str, Any]:
    return packed(SEQUENCES, [[a] * len(s) for s, a in zip(SEQUENCES, ADVANTAGES, strict=True)])


def settings(**values: Any) -> CorrectionsConfig:
    return CorrectionsConfig.model_validate({"low": LOW, "high": HIGH} | values)


def slow_weight(log_ratio: float, bound: str) -> float:
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    if LOW <= ratio <= HIGH:
        return ratio
    if bound == "mask":
        return 0.0
    return LOW if ratio < LOW else HIGH


def slow_weights(weight: str, sequence_ratio: str, bound: str) -> list[float]:
    weights = []
    for sequence in SEQUENCES:
        total = sum(sequence)
        of_sequence = total if sequence_ratio == "product" else total / len(sequence)
        for log_ratio in sequence:
            weights.append(
                {
                    "none": 1.0,
                    "token": slow_weight(log_ratio, bound),
                    "sequence": slow_weight(of_sequence, bound),
                }[weight]
            )
    return weights


@pytest.mark.parametrize("bound", ["truncate", "mask"])
@pytest.mark.parametrize("sequence_ratio", ["product", "geometric_mean"])
@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
def test_weights_equal_a_scalar_derivation(weight: str, sequence_ratio: str, bound: str) -> None:
    got = corrections(settings(weight=weight, sequence_ratio=sequence_ratio, bound=bound), **example())
    assert got.weights.tolist() == pytest.approx(slow_weights(weight, sequence_ratio, bound), rel=1e-9)


@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_log_ratios_are_clamped_to_20_where_the_bounds_are_wider(bound: str) -> None:
    tensors = packed([[-800.0, -20.5, -19.5, 19.5, 20.5, 800.0]], [[1.0] * 6])
    got = corrections(settings(bound=bound, low=0.0, high=1e12), **tensors)
    wanted = [math.exp(x) for x in (-20.0, -20.0, -19.5, 19.5, 20.0, 20.0)]
    assert got.weights.tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_a_ratio_equal_to_a_bound_is_inside(bound: str) -> None:
    tensors = packed([[0.0, 0.0]], [[1.0, 1.0]])
    for low, high in ((1.0, 2.0), (0.5, 1.0)):
        got = corrections(settings(bound=bound, low=low, high=high), **tensors)
        assert (got.weights.tolist(), got.outside.tolist()) == ([1.0, 1.0], [False, False])


@pytest.mark.parametrize(("weight", "wanted"), [("none", [0, 1, 0]), ("token", [0, 1, 0]), ("sequence", [0, 1, 1])])
def test_outside_is_told_of_the_ratio_that_decides(weight: str, wanted: list[int]) -> None:
    tensors = packed([[0.0], [1.0, 0.0]], [[1.0], [1.0, 1.0]])
    assert corrections(settings(weight=weight), **tensors).outside.tolist() == [bool(x) for x in wanted]


def test_the_order_in_which_sequences_are_packed_does_not_matter() -> None:
    tensors = example()
    order = torch.randperm(len(tensors["advantages"]), generator=torch.Generator().manual_seed(0))
    mixed = {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}
    chosen = settings(weight="sequence", negative_kl_mask=0.1)
    torch.testing.assert_close(corrections(chosen, **mixed).weights, corrections(chosen, **tensors).weights[order])


@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
def test_negative_advantages_far_from_the_sampling_policy_are_left_out(weight: str) -> None:
    threshold = 0.25
    # mean of behavior - proximal: 0.3 above the threshold, 0.2 below it, -0.3 on the other side
    sequences = [[-0.3, -0.4, -0.2], [-0.2, -0.3, -0.1], [0.3, 0.3]]
    advantages = [[-1.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [-1.0, -1.0]]
    tensors = packed(sequences, advantages)
    got = corrections(settings(weight=weight, negative_kl_mask=threshold), **tensors)
    unmasked = corrections(settings(weight=weight), **tensors)

    masked = []
    for sequence, of_sequence in zip(sequences, advantages, strict=True):
        kl = sum(-log_ratio for log_ratio in sequence) / len(sequence)
        masked += [advantage < 0 and kl > threshold for advantage in of_sequence]
    assert masked == [True] + [False] * 7
    assert got.negative_masked.tolist() == masked
    wanted = [0.0 if gone else weight for gone, weight in zip(masked, unmasked.weights.tolist(), strict=True)]
    assert got.weights.tolist() == wanted
    assert not unmasked.negative_masked.any()
    assert (unmasked.weights > 0).all()


def test_weights_are_constants_of_the_loss() -> None:
    """The gradient of a loss with the weights of the very policy that moves is weight times its own gradient."""
    tensors = example()
    tensors["proximal_logprobs"].requires_grad_()
    got = corrections(settings(weight="token", bound="mask"), **tensors)
    assert not got.weights.requires_grad
    (got.weights * -tensors["advantages"] * tensors["proximal_logprobs"]).sum().backward()
    wanted = []
    for sequence, advantage in zip(SEQUENCES, ADVANTAGES, strict=True):
        wanted += [-advantage * slow_weight(log_ratio, "mask") for log_ratio in sequence]
    assert tensors["proximal_logprobs"].grad.tolist() == pytest.approx(wanted, rel=1e-9)


def test_a_completion_of_several_versions_is_weighed_token_by_token() -> None:
    """Each token against the policy that sampled it: the first two are from an older one."""
    tensors = packed([[0.5, 0.5, 0.0, 0.0]], [[1.0] * 4])
    assert corrections(settings(), **tensors).weights.tolist() == pytest.approx([math.exp(0.5)] * 2 + [1.0] * 2)


@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
def test_no_token_has_no_weight(weight: str) -> None:
    nothing, no_ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    got = corrections(settings(weight=weight, negative_kl_mask=0.1), nothing, nothing, nothing, no_ids, 0)
    assert isinstance(got, Corrections)
    assert all(values.shape == (0,) for values in got)


def test_weights_have_the_dtype_of_the_log_probabilities() -> None:
    tensors = {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in example().items()
    }
    assert corrections(settings(), **tensors).weights.dtype == torch.float32
