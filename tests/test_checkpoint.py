"""Checkpoints: going on from one is as if nothing had happened, and a damaged one is never chosen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learner import checkpoint
from learner.checkpoint import load, save
from learner.policy import Policy
from learner.ranks import Ranks
from protocol.checkpoints import Found, damage, latest_valid
from protocol.errors import ConfigError
from tests.learning import (
    RATE,
    assert_trained_alike,
    largest_difference,
    model_folder,
    open_policy,
    train_step,
    weights,
    whole_state,
)
from tests.rows import random_rows

EXTRAS: dict[str, Any] = {"ledger": b"\x00\x01", "version": 3, "settings": {"a": [1, 2.5, "x"]}, "random": b"\xff" * 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=False)


def trained(model: str, ranks: Ranks, zero: int = 0, steps: int = 2, **changes: Any) -> Policy:
    policy = open_policy(model, ranks, zero, **changes)
    for seed in range(steps):
        train_step(policy, ranks, random_rows(seed, 6), learning_rate=RATE)
    return policy


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")],
)
def test_a_resumed_policy_goes_on_bit_for_bit(model: str, ranks: Ranks, tmp_path: Path, zero: int, dtype: str) -> None:
    policy = trained(model, ranks, zero, dtype=dtype)
    path = save(tmp_path, 2, policy, EXTRAS, 1, ranks)
    resumed = open_policy(model, ranks, zero, dtype=dtype)
    assert load(path, resumed) == EXTRAS
    assert_equal(whole_state(policy), whole_state(resumed))
    for each in (policy, resumed):
        for seed in (7, 8):
            train_step(each, ranks, random_rows(seed, 6))
    if zero == 3:  # never bit-equal even to itself
        assert_trained_alike(weights(policy), weights(resumed))
    else:
        assert_equal(whole_state(policy), whole_state(resumed))
    assert resumed.num_applied == policy.num_applied == 4


@pytest.mark.parametrize(("saved", "loaded"), [(1, 3), (3, 1), (0, 2), (3, 0)])
def test_a_checkpoint_loads_at_another_stage_without_a_difference(
    model: str, ranks: Ranks, tmp_path: Path, saved: int, loaded: int
) -> None:
    policy = trained(model, ranks, saved)
    other = open_policy(model, ranks, loaded)
    load(save(tmp_path, 2, policy, {}, 1, ranks), other)
    assert_equal(whole_state(policy), whole_state(other))
    for each in (policy, other):
        train_step(each, ranks, random_rows(7, 6), learning_rate=RATE)
    assert_trained_alike(weights(policy), weights(other))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_checkpoint_before_the_first_step_has_no_moments_to_set(
    model: str, ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    policy, other = trained(model, ranks, zero, steps=0), open_policy(model, ranks, zero)
    load(save(tmp_path, 0, policy, {}, 1, ranks), other)
    for each in (policy, other):
        train_step(each, ranks, random_rows(7, 6), learning_rate=RATE)
    assert_trained_alike(weights(policy), weights(other))
    assert other.num_applied == 1


def test_a_large_model_is_written_in_several_files(
    model: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    policy, other = trained(model, ranks), open_policy(model, ranks)
    path = save(tmp_path, 2, policy, {}, 1, ranks)
    assert len(list(path.glob("training-*.safetensors"))) > 2
    assert damage(path) == ""
    load(path, other)
    assert_equal(whole_state(policy), whole_state(other))


def test_the_hf_folder_loads_as_it_is(model: str, ranks: Ranks, tmp_path: Path) -> None:
    policy = trained(model, ranks, 3)
    path = save(tmp_path, 2, policy, EXTRAS, 1, ranks) / "hf"
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert largest_difference(dict(lm.named_parameters()), weights(policy)) == 0.0
    assert lm.config._attn_implementation == "sdpa"
    assert PreTrainedTokenizerFast.from_pretrained(path)("w5 w7").input_ids == [5, 7]


@pytest.fixture
def three(model: str, ranks: Ranks, tmp_path: Path) -> Path:
    policy = trained(model, ranks, steps=1)
    for step in (9, 10, 11):
        save(tmp_path, step, policy, EXTRAS, 3, ranks)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_valid_checkpoint_is_chosen_by_number(three: Path) -> None:
    found = latest_valid(three)
    assert (found.path, found.damaged) == (three / "step_11", ())


@pytest.mark.parametrize(
    "name", ["training-00000.safetensors", "state.msgpack", "hf/model.safetensors", "hf/config.json"]
)
def test_one_flipped_bit_makes_an_older_checkpoint_the_choice(three: Path, name: str) -> None:
    flip(three / "step_11" / name)
    found = latest_valid(three)
    assert found.path == three / "step_10"
    assert found.damaged == (f"{three / 'step_11'}: {name} does not match its digest",)


def test_missing_cut_and_foreign_files_are_reported(three: Path) -> None:
    os.truncate(three / "step_11" / "hf" / "model.safetensors", 10)
    (three / "step_10" / "state.msgpack").unlink()
    (three / "step_9" / "manifest.json").write_text("{")
    found = latest_valid(three)
    assert found.path is None
    size = json.loads((three / "step_11" / "manifest.json").read_text())["files"]["hf/model.safetensors"][0]
    cut, missing, foreign = (reason.partition(": ")[2] for reason in found.damaged)
    assert cut == f"hf/model.safetensors must have {size} bytes, has 10"
    assert missing == f"{three / 'step_10' / 'state.msgpack'}: No such file or directory"
    assert foreign.startswith("manifest.json cannot be read: JSONDecodeError: ")


def test_a_half_written_checkpoint_is_never_looked_at_and_goes_with_the_next(
    model: str, ranks: Ranks, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise OSError("power cut")

    policy = trained(model, ranks, steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "seal", crash)
        with pytest.raises(OSError, match="power cut"):
            save(three, 12, policy, EXTRAS, 3, ranks)
    assert (three / "tmp-step_12" / "hf" / "model.safetensors").exists()
    assert latest_valid(three).path == three / "step_11"
    save(three, 13, policy, EXTRAS, 2, ranks)
    assert sorted(path.name for path in three.iterdir()) == ["step_11", "step_13"]


def test_checkpoints_of_a_course_that_was_left_are_removed(model: str, ranks: Ranks, three: Path) -> None:
    policy = trained(model, ranks, steps=1)
    flip(three / "step_10" / "state.msgpack")
    save(three, 10, policy, {"again": True}, 3, ranks)
    assert sorted(path.name for path in three.iterdir()) == ["step_10", "step_9"]
    assert load(three / "step_10", policy) == {"again": True}
    assert latest_valid(three).damaged == ()


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "nowhere") == Found(None, ())


def test_a_checkpoint_of_another_model_is_refused(
    ranks: Ranks, three: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = open_policy(model_folder(tmp_path_factory.mktemp("other"), tied=True), ranks)
    before = weights(other)
    with pytest.raises(ConfigError, match=r"step_11 is a checkpoint of another model: lm_head.weight is missing"):
        load(three / "step_11", other)
    assert largest_difference(before, weights(other)) == 0.0
