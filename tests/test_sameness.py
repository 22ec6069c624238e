"""Loss, gradient and weights of the learner are the same, however many ranks train, at whatever ZeRO stage and budget.

Everything is held against one padded batch in transformers' own forward. Gradients are compared by name; of weights
after several steps `assert_trained_alike` says what can be asked, because Adam makes a whole learning rate of the
rounding of a gradient that is almost zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from learner.ranks import Ranks
from tests.critics import padded_value_gradient, valued_rows
from tests.learning import (
    BUDGETS,
    assert_trained_alike,
    gradient,
    largest_relative_difference,
    model_folder,
    open_policy,
    padded_gradient,
    sampled_batch,
)
from tests.rank_worlds import NUM_COMPLETIONS, World, served_alone

pytestmark = pytest.mark.timeout(300)  # the first test waits for a whole world of ranks

STAGES = [0, 1, 2, 3]
SAME = 1e-5  # relative, in float32


@pytest.fixture(scope="module", params=["two_ranks", "three_ranks"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> World:
    folder = tmp_path_factory.mktemp("alone")
    return served_alone(folder, model_folder(folder / "untied", tied=False), ranks)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("zero", STAGES)
def test_one_rank_has_loss_and_gradient_of_a_padded_batch(tmp_path: Path, ranks: Ranks, zero: int, tied: bool) -> None:
    model = model_folder(tmp_path, tied)
    rows = sampled_batch(model)
    loss, wanted = padded_gradient(model, rows)
    policy = open_policy(model, ranks, zero, clip_grad=0.0)
    num_micro_batches = []
    for budget in BUDGETS:
        found, update = gradient(policy, ranks, rows, budget)
        assert update.sums["loss"] == pytest.approx(loss, rel=SAME)
        assert largest_relative_difference(found, wanted) < SAME
        num_micro_batches.append(update.num_micro_batches)
    assert num_micro_batches[0] == len(rows) > num_micro_batches[1] > num_micro_batches[2] == 1


@pytest.mark.parametrize("zero", STAGES)
def test_several_ranks_have_loss_and_gradient_of_a_padded_batch(world: World, zero: int) -> None:
    model = str(world.folder / "untied")
    rows = sampled_batch(model)
    loss, wanted = padded_gradient(model, rows)
    norm = sum(value.square().sum() for value in wanted.values()) ** 0.5
    saved = load_file(world.folder / "gradients.safetensors")
    for budget in BUDGETS:
        found = {name: saved[f"{zero}/{budget}/{name}"] for name in wanted}
        assert largest_relative_difference(found, wanted) < SAME
        for rank in world.seen:
            seen_loss, seen_norm, num_micro_batches = rank["gradients"][f"{zero}/{budget}"]
            assert seen_loss == pytest.approx(loss, rel=SAME)
            assert seen_norm == pytest.approx(float(norm), rel=SAME)
            if budget == 1:
                assert num_micro_batches == -(-len(rows) // len(world.seen)), "one sequence each"


@pytest.mark.parametrize("zero", STAGES)
def test_a_critic_on_several_ranks_has_loss_and_gradient_of_a_padded_batch(world: World, zero: int) -> None:
    loss, wanted, _ = padded_value_gradient(str(world.folder / "untied"), valued_rows())
    norm = sum(value.square().sum() for value in wanted.values()) ** 0.5
    saved = load_file(world.folder / "gradients.safetensors")
    assert largest_relative_difference({name: saved[f"{zero}/critic/{name}"] for name in wanted}, wanted) < SAME
    for rank in world.seen:
        seen_loss, seen_norm, _ = rank["gradients"][f"{zero}/critic"]
        assert seen_loss == pytest.approx(loss, rel=SAME)
        assert seen_norm == pytest.approx(float(norm), rel=SAME)


def steps_of(world: World) -> list[list[dict[str, Any]]]:
    """What the ranks saw of each step of the served run, by step and rank."""
    assert all(rank["served"]["complete"] for rank in world.seen)
    return [list(of_ranks) for of_ranks in zip(*(rank["served"]["steps"] for rank in world.seen), strict=True)]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [*chain.from_iterable(lists)]


def test_batches_that_nothing_divides_are_cut_into_shares_that_make_them_whole(world: World, alone: World) -> None:
    lengths = [[len(rank["completions"]) for rank in ranks] for ranks in steps_of(world)]
    assert [sum(of_ranks) for of_ranks in lengths] == NUM_COMPLETIONS
    assert 0 in lengths[-1], "a rank without any completion"
    for ranks, (one,) in zip(steps_of(world), steps_of(alone), strict=True):
        assert sorted(joined(rank["completions"] for rank in ranks)) == sorted(one["completions"])


def test_every_token_has_one_advantage_whoever_trains_it(world: World, alone: World) -> None:
    """Equal to the bit, from a reward table that is whole on every rank, also on one without completions."""
    for ranks, (one,) in zip(steps_of(world), steps_of(alone), strict=True):
        assert {rank["rewards"] for rank in ranks} == {one["rewards"]}
    tokens = zip(*(rank["served"]["tokens"] for rank in world.seen), strict=True)
    for of_ranks, of_one in zip(tokens, alone.seen[0]["served"]["tokens"], strict=True):
        assert sorted(joined(of_ranks)) == sorted(map(list, of_one))
        assert any(advantage for _, _, advantage in of_one), "nothing is learned from this batch"


def test_ranks_that_ask_the_broker_train_like_one_on_the_whole_batch(world: World, alone: World) -> None:
    for ranks, (one,) in zip(steps_of(world), steps_of(alone), strict=True):
        assert one["grad_norm"] > 0.01
        for rank in ranks:
            assert rank["loss"] == pytest.approx(one["loss"], rel=SAME)
            assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=SAME)
    assert_trained_alike(weights_of(world), weights_of(alone))


def weights_of(world: World) -> dict[str, Any]:
    """Of the served run's last checkpoint."""
    checkpoint = world.folder / "served" / "checkpoints" / f"step_{len(NUM_COMPLETIONS)}"
    state = load_file(checkpoint / "training-00000.safetensors")
    return {name: value for name, value in state.items() if name.startswith("fp32/")}
