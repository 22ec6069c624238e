"""What a kind of device needs before a run starts on it, and what a process does with it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.vllm_settings import environment
from launch.devices import detect
from launch.plan import Devices
from launch.preflight import check_device
from protocol.config import Config
from protocol.errors import PreflightError
from tests.vendor_tools import add_npu, add_nvidia, add_package, claim_cuda_torch, path_with

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on the PATH; no mask is set."""
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on this process's path for packages."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


def needs(device: str, devices: Devices, engine: str = "vllm", **environ: str) -> str:
    """What is said; nothing if nothing is lacking."""
    config = Config.model_validate({"run": {"device": device}, "generators": {"engine": engine}})
    try:
        check_device(config, devices, environ)
    except PreflightError as error:
        return str(error)
    return ""


def test_npu_names_each_package_that_is_missing_and_what_works_here(tools: Path, packages: Path) -> None:
    add_npu(tools)
    npu = detect("npu", {})
    said = needs("npu", npu).splitlines()
    assert said[0] == "--device npu needs more than there is; what works here: --device cpu"
    assert said[1].startswith("  needs the package torch_npu, which this Python does not have: pip install torch-npu")
    assert "package vllm_ascend, which this Python does not have: pip install vllm-ascend" in said[2]
    assert "set_env.sh (neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set)" in said[3]
    assert len(said) == 4
    assert "vllm_ascend" not in needs("npu", npu, engine="transformers")
    assert needs("auto", npu).startswith("--device auto, here npu, needs more than there is")

    add_package(packages, "torch_npu")
    add_package(packages, "vllm_ascend")
    importlib.invalidate_caches()
    assert needs("npu", npu, ASCEND_HOME_PATH="/usr/local/Ascend") == ""


def test_cuda_without_a_card_says_who_was_asked_and_what_was_masked(tools: Path) -> None:
    said = needs("cuda", detect("cuda", {}))
    assert "needs a card, none is visible: there must be one that nvidia-smi or amd-smi or rocm-smi shows" in said
    add_nvidia(tools)
    masked = {"CUDA_VISIBLE_DEVICES": "-1"}
    assert "shows and CUDA_VISIBLE_DEVICES=-1 lets through" in needs("cuda", detect("cuda", masked), **masked)


def test_a_card_needs_a_torch_that_was_built_for_it(tools: Path, packages: Path) -> None:
    add_nvidia(tools)
    add_package(packages, "torch_of_a_test")
    (packages / "torch-2.13.0+cpu.dist-info").mkdir()
    (packages / "torch-2.13.0+cpu.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0+cpu\n")
    said = needs("cuda", detect("cuda", {}))
    assert "needs a torch that was built for it, found torch 2.13.0+cpu: TETHER_DEVICE=cuda make setup" in said


def test_another_device_that_works_here_is_named(tools: Path, packages: Path) -> None:
    add_nvidia(tools)
    claim_cuda_torch(packages)
    assert needs("cuda", detect("cuda", {})) == ""
    assert needs("npu", detect("npu", {})).splitlines()[0].endswith("what works here: --device cuda")


def test_a_learner_on_npu_without_torch_npu_says_so() -> None:
    from learner.ranks import Ranks

    with pytest.raises(PreflightError, match="needs the package torch_npu, which does not load: No module"):
        Ranks.open({}, "npu")


TORCH_NPU = """
import torch
torch.utils.rename_privateuse1_backend("npu")
class npu:
    def set_device(place): raise SystemExit(f"the card {place} was taken")
torch._register_device_module("npu", npu)
"""

ASCEND = (
    "[vllm.platform_plugins]\nascend = vllm_ascend:register\n[vllm.general_plugins]\nascend_more = vllm_ascend:more\n"
)
ASCEND_SOURCE = """
def register(): return "vllm_ascend.platform.NPUPlatform"
def more(): pass
"""
ASCEND_PLATFORM = "from vllm.platforms.cpu import CpuPlatform\nclass NPUPlatform(CpuPlatform): pass\n"


def python(code: str, packages: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)


def test_a_learner_makes_npu_known_to_torch_before_it_takes_its_card(tmp_path: Path) -> None:
    """The package is made up; that torch knows no npu without it is real."""
    add_package(tmp_path, "torch_npu", source=TORCH_NPU)
    said = python("from learner.ranks import Ranks; Ranks.open({'LOCAL_RANK': '3'}, 'npu')", tmp_path)
    assert "the card npu:3 was taken" in said.stderr


def test_vllm_finds_the_platform_of_npu_beside_our_plugin(packages: Path) -> None:
    """The package is made up, vLLM and its search for plugins are real."""
    add_package(packages, "vllm_ascend", source=ASCEND_SOURCE, entry_points=ASCEND)
    (packages / "vllm_ascend" / "platform.py").write_text(ASCEND_PLATFORM)
    assert environment("npu")["VLLM_PLUGINS"] == "tether,ascend,ascend_more"
    assert environment("cpu")["VLLM_PLUGINS"] == "tether"
    code = """
import os
from actors.vllm_settings import environment
os.environ.update(environment("npu"))
from vllm.platforms import current_platform
from vllm.plugins import load_plugins_by_group
print(type(current_platform).__name__, sorted(load_plugins_by_group("vllm.general_plugins")))
"""
    assert python(code, packages).stdout == "NPUPlatform ['ascend_more', 'tether']\n"
