"""Several ranks over gloo do what one rank does, at every ZeRO stage, with unlike numbers of rows and micro-batches."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from learner import checkpoint
from learner.batches import pack
from learner.ranks import Ranks, environment
from learner.warmup import warm_up
from protocol.errors import ConfigError
from protocol.weights import Snapshot
from tests.learning import (
    RATE,
    assert_trained_alike,
    examples,
    largest_difference,
    open_policy,
    sampled_steps,
    train_step,
    warmup_settings,
    weights,
    whole_state,
)
from tests.rank_worlds import World

pytestmark = pytest.mark.timeout(300)  # the first test waits for a whole world of ranks

STAGES = [0, 1, 2, 3]
NUM_RANKS = 3


def one_rank(
    three_ranks: World, ranks: Ranks, zero: int
) -> tuple[dict[str, torch.Tensor], list[float], list[float], list[float]]:
    """Weights, norms, losses and tokens of the same steps on one rank in ZeRO 0."""
    model = str(three_ranks.folder / ("tied" if zero % 2 else "untied"))
    policy = open_policy(model, ranks)
    updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in sampled_steps(model)]
    sums = [update.sums for update in updates]
    return weights(policy), [u.grad_norm for u in updates], [s["loss"] for s in sums], [s["tokens"] for s in sums]


@pytest.mark.parametrize("zero", STAGES)
def test_several_ranks_train_like_one(three_ranks: World, ranks: Ranks, zero: int) -> None:
    wanted, norms, losses, tokens = one_rank(three_ranks, ranks, zero)
    for seen in (rank[f"zero{zero}"] for rank in three_ranks.seen):
        assert seen["norms"] == pytest.approx(norms, rel=1e-5)
        assert seen["losses"] == pytest.approx(losses, rel=1e-5)
        assert seen["tokens"] == tokens
    shards = load_file(three_ranks.folder / f"checkpoints{zero}" / "step_4" / "training-00000.safetensors")
    assert_trained_alike({name: shards[f"fp32/{name}"] for name in wanted}, wanted)


def test_the_ranks_really_had_unlike_numbers_of_micro_batches(three_ranks: World) -> None:
    steps = sampled_steps(str(three_ranks.folder / "tied"))
    own = [[len(pack(rows[rank::NUM_RANKS], 64)) for rank in range(NUM_RANKS)] for rows in steps]
    assert sum(len(set(numbers)) > 1 for numbers in own) >= 2
    assert any(0 in numbers for numbers in own)
    for rank in three_ranks.seen:
        assert rank["zero1"]["micro_batches"] == [max(numbers) for numbers in own]


@pytest.mark.parametrize("zero", STAGES)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(three_ranks: World, zero: int) -> None:
    for rank in three_ranks.seen:
        assert rank[f"zero{zero}"]["skipped"]
        assert rank[f"zero{zero}"]["unchanged"]


@pytest.mark.parametrize("zero", STAGES)
def test_a_snapshot_that_several_ranks_wrote_is_the_checkpoint_of_that_step(three_ranks: World, zero: int) -> None:
    snapshot = Snapshot.open(three_ranks.folder / f"snapshots{zero}" / "v4", 4)
    snapshot.verify()
    shards = load_file(three_ranks.folder / f"checkpoints{zero}" / "step_4" / "training-00000.safetensors")
    hf = load_file(three_ranks.folder / f"checkpoints{zero}" / "step_4" / "hf" / "model.safetensors")
    for spec in snapshot.manifest.tensors:
        tensor = torch.from_numpy(snapshot.view(spec)).view(torch.float32).reshape(spec.shape)
        assert torch.equal(tensor, shards[f"fp32/{spec.name}"])
        assert torch.equal(tensor, hf[spec.name])


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("into", [0, 1, 3])
def test_a_checkpoint_of_several_ranks_loads_in_one_rank_at_any_stage(
    three_ranks: World, ranks: Ranks, zero: int, into: int
) -> None:
    path = three_ranks.folder / f"checkpoints{zero}" / "step_4"
    policy = open_policy(str(three_ranks.folder / ("tied" if zero % 2 else "untied")), ranks, into)
    assert checkpoint.load(path, policy) == {"who": 0}
    saved, state = load_file(path / "training-00000.safetensors"), whole_state(policy)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    assert policy.num_applied == 4


def test_a_checkpoint_of_one_rank_goes_on_in_several(three_ranks: World, ranks: Ranks) -> None:
    saved = load_file(three_ranks.folder / "one_rank" / "step_2" / "training-00000.safetensors")
    assert largest_difference(load_file(three_ranks.folder / "restored.safetensors"), saved) == 0.0
    policy = open_policy(str(three_ranks.folder / "tied"), ranks)
    updates = [
        train_step(policy, ranks, rows, learning_rate=RATE)
        for rows in sampled_steps(str(three_ranks.folder / "tied"))[:3]
    ]
    for rank in three_ranks.seen:
        assert rank["restored"]["norm"] == pytest.approx(updates[2].grad_norm, rel=1e-5)
        assert rank["restored"]["applied"] == 3
        assert rank["restored"]["extras"] == {"ledger": [0, 255]}


def test_supervised_steps_do_not_depend_on_the_number_of_ranks(three_ranks: World, ranks: Ranks) -> None:
    losses: list[float] = []
    policy = open_policy(str(three_ranks.folder / "tied"), ranks)
    warm_up(policy, examples(), warmup_settings(steps=4), 3, 64, ranks, lambda step: losses.append(step.loss))
    for rank in three_ranks.seen:
        assert rank["supervised"] == pytest.approx(losses, rel=1e-4)


def test_ranks_compare_add_up_and_hear_from_the_first(three_ranks: World) -> None:
    for rank in three_ranks.seen:
        assert (rank["equal"], rank["unequal"]) == (True, False)
        assert rank["sum"] == {"a": 1.5, "b": 3.0}
        assert rank["max"] == {"a": -1.0, "b": 2.0}
        assert rank["any"] == [True, False]
        assert rank["first"] == 1000


def test_a_rank_that_does_not_come_is_named_within_the_deadline(three_ranks: World) -> None:
    message = three_ranks.seen[0]["alone"]
    assert "learner rank 0 waited for 2 other ranks to write down nothing" in message


def test_one_process_is_a_world_of_one(ranks: Ranks) -> None:
    assert (ranks.rank, ranks.num_ranks, ranks.is_first) == (0, 1, True)
    assert ranks.same_everywhere((1, 2))
    assert ranks.sum_across({"x": 2.5}) == ranks.max_across({"x": 2.5}) == {"x": 2.5}


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device must be one of cpu, cuda, npu, got tpu"):
        Ranks.open({}, "tpu")


def test_the_environment_of_a_single_process_is_complete() -> None:
    assert environment("cpu") == {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
