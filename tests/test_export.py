"""tools/export.py: a checkpoint's model as a folder of its own, and never from a checkpoint that is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learner import checkpoint
from learner.ranks import Ranks
from protocol.errors import Exit
from tests.learning import model_folder, open_policy, train_step
from tests.rows import random_rows
from tools.export import main

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 9, 13, 20]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A model, and a run of one checkpoint that trained adapters on it."""
    folder = tmp_path_factory.mktemp("run")
    policy = open_policy(model_folder(folder / "model"), ranks, lora={"rank": 4})
    train_step(policy, ranks, random_rows(1, 6), learning_rate=1e-2)
    checkpoint.save(folder / "checkpoints", 1, policy, {}, 1, ranks)
    return folder


@pytest.fixture
def path(run: Path) -> Path:
    return run / "checkpoints" / "step_1"


@torch.no_grad()
def logits(folder: Path | str, adapter: Path | None = None) -> torch.Tensor:
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (PeftModel.from_pretrained(lm, adapter) if adapter else lm)(IDS).logits


def test_an_exported_model_is_the_merged_one_with_its_tokenizer(run: Path, path: Path, tmp_path: Path) -> None:
    assert main([str(path), str(tmp_path / "new" / "out")]) == Exit.DONE
    out = tmp_path / "new" / "out"
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in (path / "hf").iterdir()
    }
    assert PreTrainedTokenizerFast.from_pretrained(out)("w5 w7").input_ids == [5, 7]
    assert (logits(out) - logits(run / "model")).abs().max() > 1e-3, "it has learned"
    assert [each.name for each in out.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_exported_adapters_on_the_base_are_the_exported_model(run: Path, path: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert main([str(path), str(tmp_path / "adapter"), "--adapter"]) == Exit.DONE
    assert main([str(path), str(tmp_path / "model")]) == Exit.DONE
    torch.testing.assert_close(
        logits(run / "model", tmp_path / "adapter"), logits(tmp_path / "model"), atol=1e-5, rtol=0.0
    )


def test_a_damaged_checkpoint_is_not_exported(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = path / "hf" / "config.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole.replace(b"{", b"[", 1))
        assert main([str(path), str(tmp_path / "out")]) == Exit.SETTINGS
    finally:
        file.write_bytes(whole)
    expected = f"error: {path} is damaged and not exported: hf/config.json does not match its digest; choose another"
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_refused_and_those_that_are_near_are_named(
    run: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), str(tmp_path / "out")]) == Exit.SETTINGS
    said = capsys.readouterr().err
    assert said.startswith("error: expected a checkpoint, a folder like runs/NAME/checkpoints/step_50, found none in ")
    assert said.endswith(f"; there are {path}\n")


def test_a_folder_with_something_in_it_is_not_written_over(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main([str(path), str(tmp_path)]) == Exit.SETTINGS
    assert f"{tmp_path} has something in it; choose another" in capsys.readouterr().err
    assert main([str(path), str(tmp_path / "mine" / "out")]) == Exit.PREFLIGHT
    assert "not a directory; choose another place" in capsys.readouterr().err


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step_1" / "hf").mkdir(parents=True)
    (tmp_path / "step_1" / "manifest.json").write_text(json.dumps({"format": 2, "files": {}}))
    assert main([str(tmp_path / "step_1"), str(tmp_path / "out"), "--adapter"]) == Exit.SETTINGS
    assert "its run trained all weights; leave --adapter out" in capsys.readouterr().err


def test_the_command_answers_without_torch() -> None:
    code = "import sys; import tools.export; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
