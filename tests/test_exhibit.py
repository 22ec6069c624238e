"""A model that is only evaluated: its files' bytes are what generators load, and what cannot be loaded is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actors.snapshot_tensors import snapshot_tensors
from learner.exhibit import Stored, snapshot_of, stored, weight_files
from protocol.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TENSORS = {
    "embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "norm.weight": torch.tensor([1.5, -2.0]).bfloat16(),
    "head.weight": torch.tensor([[0.25]]).half(),
}


def sharded(folder: Path) -> Path:
    """A model in two files, as the Hub has large ones, and a file that belongs to neither."""
    save_file({"embed.weight": TENSORS["embed.weight"]}, folder / "model-1.safetensors")
    rest = {name: TENSORS[name] for name in ("norm.weight", "head.weight")}
    rest["layers.0.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(rest, folder / "model-2.safetensors")
    save_file({"everything.else": torch.ones(1)}, folder / "consolidated.safetensors")
    homes = {name: f"model-{1 if name == 'embed.weight' else 2}.safetensors" for name in rest | TENSORS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


def all_stored(folder: Path) -> list[Stored]:
    return [tensor for file in weight_files(str(folder)) for tensor in stored(file)]


def test_a_snapshot_has_every_parameter_as_it_lies_in_the_files(tmp_path: Path) -> None:
    snapshot = snapshot_of(all_stored(sharded(tmp_path)), tmp_path / "snapshot")
    found = dict(snapshot_tensors(snapshot))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"expected 48 bytes of embed\.weight in .*model-1\.safetensors, found 44"):
        snapshot_of(all_stored(tmp_path), tmp_path / "snapshot")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 of a pickle", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 8])
def test_what_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected safetensors in .*model\.safetensors"):
        all_stored(tmp_path)


def test_weights_that_no_snapshot_can_hold_are_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"expected weights of F32, BF16, F16, a\.weight in .* is I8; eval"):
        all_stored(tmp_path)


def test_a_folder_without_safetensors_says_how_to_save_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"found no model\.safetensors; save them with model\.save_pretrained"):
        weight_files(str(tmp_path))


def test_an_evaluation_needs_no_torch_in_the_learners_place() -> None:
    code = "import sys; import learner.exhibit; assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
