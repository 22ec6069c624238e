"""Which cards there are and who may see them: real subprocesses, of fake tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.devices import detect, visible
from launch.plan import Devices
from protocol.accelerators import CUDA, NPU, ROCM, Card, backend_of, read_amd_smi, read_npu_smi, read_rocm_smi
from protocol.errors import ConfigError, PreflightError
from tests.vendor_tools import NPU_MAP, NPU_TABLE, ROCM_CARDS, add_npu, add_nvidia, add_rocm, add_tool, path_with

FOUR = [Card(str(i), "card", uuid=f"GPU-{i:04}") for i in range(4)]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on the PATH; no mask is set."""
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    return tmp_path / "bin"


def found(devices: Devices) -> tuple[str, list[str], list[int]]:
    return devices.kind, [card.index for card in devices.cards], [card.memory_bytes >> 30 for card in devices.cards]


@pytest.mark.parametrize(
    ("add", "wanted", "kind", "gibibytes"),
    [
        (add_nvidia, "cuda", "cuda", [140, 140]),
        (add_rocm, "cuda", "rocm", [191, 191]),
        (add_npu, "npu", "npu", [64, 32]),
    ],
)
def test_cards_are_read_from_the_vendors_tool(
    tools: Path, add: Callable[[Path], None], wanted: str, kind: str, gibibytes: list[int]
) -> None:
    add(tools)
    assert found(detect(wanted, {})) == (kind, ["0", "1"], gibibytes)
    assert found(detect("auto", {})) == (kind, ["0", "1"], gibibytes)
    assert detect("cpu", {}).kind == "cpu"


def test_auto_takes_nvidia_before_amd_before_ascend_before_the_processor(tools: Path) -> None:
    seen = [detect("auto", {}).kind]
    for add in (add_npu, add_rocm, add_nvidia):
        add(tools)
        seen.append(detect("auto", {}).kind)
    assert seen == ["cpu", "npu", "rocm", "cuda"]
    assert detect("auto", {"CUDA_VISIBLE_DEVICES": ""}).kind == "npu"


def test_a_tool_that_fails_hangs_or_talks_nonsense_shows_no_card(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.devices.QUERY_TIMEOUT_S", 0.2)
    add_tool(tools, "amd-smi", "{ not json")
    add_tool(tools, "npu-smi", "no card\n", "-m")  # `npu-smi info` matches nothing and prints nothing
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tools / "nvidia-smi").chmod(0o755)
    assert detect("auto", {}).kind == "cpu"
    assert detect("cuda", {}).cards == ()


def test_amd_smi_is_read_in_both_shapes_that_it_has_had() -> None:
    card = {
        "gpu": 3,
        "asic": {"market_name": "MI300X", "asic_serial": "0xAB"},
        "vram": {"size": {"value": 2, "unit": "GB"}},
    }
    wanted = [Card("3", "MI300X", 2 << 30, "GPU-AB")]
    assert read_amd_smi(json.dumps([card])) == read_amd_smi(json.dumps({"gpu_data": [card]})) == wanted
    assert read_amd_smi(json.dumps([{"gpu": 0, "vram": {"size": "N/A"}}, {"x": 1}, 7])) == [Card("0", "AMD GPU")]


def test_rocm_smi_cards_come_by_number_whatever_the_capitals() -> None:
    assert [(card.index, card.uuid) for card in read_rocm_smi(ROCM_CARDS)] == [("0", "GPU-A0A"), ("1", "GPU-B0B")]
    assert {card.name for card in read_rocm_smi(ROCM_CARDS)} == {"AMD Instinct MI300X"}


def test_npu_chips_are_read_by_their_logic_id_in_both_widths_of_the_table() -> None:
    assert [(c.index, c.name) for c in read_npu_smi(NPU_MAP)] == [("0", "Ascend 910B3"), ("1", "Ascend 910B3")]
    wide = "NPU ID Chip ID Chip Logic ID Chip Phy-ID Chip Name\n 7 0 14 14 Ascend910\n 7 2 - - Mcu\n"
    two_dies = NPU_TABLE.replace("| 5     910B3 ", "| 7     910C  ").replace(
        "| 0                         | 0000:C2", "| 0     14                  | 0000:C2"
    )
    assert read_npu_smi(wide + two_dies) == [Card("14", "Ascend910", 32 << 30)]


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [("2,0", "20"), ("GPU-0003", "3"), (" 1 , 3 ", "13"), ("", ""), ("-1", ""), ("NoDevFiles", "")],
)
def test_a_mask_names_cards_by_number_or_uuid_in_its_own_order(mask: str, wanted: str) -> None:
    assert "".join(card.index for card in visible(CUDA, FOUR, {"CUDA_VISIBLE_DEVICES": mask})) == wanted
    assert "".join(card.index for card in visible(NPU, FOUR, {"ASCEND_RT_VISIBLE_DEVICES": mask})) == wanted


def test_a_slice_of_a_card_is_a_card() -> None:
    [card] = visible(CUDA, FOUR, {"CUDA_VISIBLE_DEVICES": "MIG-5f"})
    assert (card.index, card.memory_bytes) == ("MIG-5f", 0)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            "0,9",
            "=0,9 has '9', which is none of them; expected some of the cards 0, 1, 2, 3, which nvidia-smi",
        ),
        ("1,1", "has '1', twice"),
        ("1,GPU-0001", "has 'GPU-0001', twice"),
        ("GPU-0", "has 'GPU-0', for several cards"),
        ("1,", "has '', which is none of them"),
    ],
)
def test_a_mask_that_names_what_is_not_there_is_refused(mask: str, said: str) -> None:
    with pytest.raises(PreflightError) as caught:
        visible(CUDA, FOUR, {"CUDA_VISIBLE_DEVICES": mask})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, ["3"]),
        ({"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "2"}, ["2"]),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, ["0", "1"]),  # counted anew
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, ["1"]),  # the second of those two
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "GPU-0003"}, ["1"]),
        (
            dict.fromkeys(("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), "0,1,2,3"),
            list("0123"),
        ),
    ],
)
def test_on_rocm_the_outer_mask_is_applied_first_and_counts_anew(environ: dict[str, str], wanted: list[str]) -> None:
    assert [card.index for card in visible(ROCM, FOUR, environ)] == wanted


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "2,3"},
            "expected some of the cards 0, 1, which ROCR_VISIBLE_DEVICES=2,3 leaves and counts anew, from 0 (unset one",
        ),
        (
            {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"},
            "expected one list of visible cards, found HIP_VISIBLE_DEVICES=0 and CUDA_VISIBLE_DEVICES=1",
        ),
    ],
)
def test_masks_that_contradict_each_other_are_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(PreflightError) as caught:
        visible(ROCM, FOUR, environ)
    assert said in str(caught.value)


def test_each_device_has_its_collective_backend() -> None:
    assert [backend_of(device) for device in ("cpu", "cuda", "npu")] == ["gloo", "nccl", "hccl"]
    with pytest.raises(ConfigError, match=r"device must be one of cpu, cuda, npu, got tpu; set run\.device"):
        backend_of("tpu")
