"""Snapshots of a policy: what generators map is what the learner has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.publisher import Publisher
from learner.ranks import Ranks
from protocol.weights import Snapshot
from tests.learning import model_folder, open_policy, train_step, weights
from tests.rows import random_rows


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=request.param)


def tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.from_numpy(snapshot.view(spec)).view(getattr(torch, spec.dtype)).reshape(spec.shape)
        for spec in snapshot.manifest.tensors
    }


@pytest.mark.parametrize(("zero", "dtype"), [(0, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_a_snapshot_has_the_current_weights_in_the_dtype_that_computes(
    model: str, ranks: Ranks, tmp_path: Path, zero: int, dtype: str
) -> None:
    policy = open_policy(model, ranks, zero, dtype=dtype)
    publisher = Publisher(tmp_path / "snapshots", policy, ranks)
    train_step(policy, ranks, random_rows(1, 6))
    publisher.copy(1)
    wanted = {name: value.to(getattr(torch, dtype)) for name, value in weights(policy).items()}
    train_step(policy, ranks, random_rows(2, 6))  # copying is over: this must not reach the snapshot
    snapshot = publisher.finish()
    snapshot.verify()
    got = tensors(snapshot)
    assert snapshot.version == 1
    assert got.keys() == wanted.keys() == dict(AutoModelForCausalLM.from_pretrained(model).named_parameters()).keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_nothing_has_its_name_before_finish_and_what_nobody_reads_is_written_over(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "snapshots"
    (folder / "v77").mkdir(parents=True)
    publisher = Publisher(folder, open_policy(model, ranks), ranks)
    assert list(folder.iterdir()) == []  # an earlier run's are gone
    for version in range(4):
        publisher.copy(version)
        assert not (folder / f"v{version}").exists()
        publisher.finish().verify()
        assert (folder / f"v{version}").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["v2", "v3"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_unchanged_policy_keeps_its_digest(model: str, ranks: Ranks, tmp_path: Path) -> None:
    policy = open_policy(model, ranks)
    publisher = Publisher(tmp_path / "snapshots", policy, ranks)
    digests = []
    for version in (0, 1, 2):
        publisher.copy(version)
        digests.append(publisher.finish().digest)
        if version == 1:
            train_step(policy, ranks, random_rows(1, 6))
    assert digests[0] == digests[1] != digests[2]


def test_a_version_is_finished_before_the_next_is_copied(model: str, ranks: Ranks, tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "snapshots", open_policy(model, ranks), ranks)
    with pytest.raises(AssertionError, match=r"copy\(\) comes first"):
        publisher.finish()
    publisher.copy(0)
    with pytest.raises(AssertionError, match=r"finish\(\) of the version before must come first"):
        publisher.copy(1)
