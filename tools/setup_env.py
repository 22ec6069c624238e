"""Builds `.venv`: finds out what this machine is, installs the pinned list for it, pays once what first use would cost.

`make` runs it before every target, under any Python 3.11 to 3.13 and before anything is installed: standard library
only. Promises: with nothing to do it returns at once (`outstanding`); an interrupted run goes on where it stopped
(`build` writes the stamp after each step); the CPU and the CUDA build of vLLM, which share one import name, never meet
(`must_rebuild`); versions are those of the list (`pip`); what cannot work is said before any download (`missing`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"  # {"device": ..., "steps": {step: digest of what it was made from}}
LOG = VENV / "setup.log"  # what the newest command printed
UV = "uv==0.13.8"  # only where pip finds no CPU build of torch: uv knows PyTorch's own index by name

USE_CUDA = "import torch; torch.zeros(1, device='cuda')"
# vLLM inspects a model class in a process of its own and keeps what it saw: 11 s of a first start.
INSPECT_MODEL = """
from vllm.model_executor.models.registry import ModelRegistry
ModelRegistry.models["Qwen2ForCausalLM"].inspect_model_cls()
"""


class SetupError(Exception):
    """What is wrong and what to do about it, for the user."""


def missing(version: tuple[int, ...], has_ensurepip: bool, compiler: str | None) -> list[str]:
    """What this machine lacks, one sentence each; empty when set-up can begin."""
    found = []
    if not (3, 11) <= version[:2] <= (3, 13):
        seen = ".".join(map(str, version[:3]))
        found.append(f"Python 3.11, 3.12 or 3.13 is needed, this is {seen}; name another one: make PYTHON=python3.12")
    if not has_ensurepip:
        found.append("Python's module ensurepip is needed; on Debian and Ubuntu: apt install python3-venv")
    if compiler is None:
        found.append(
            "a C++ compiler is needed: c++, g++ or clang++, or name it in CXX; on Debian and Ubuntu: apt install g++"
        )
    return found


def pick_device(wanted: str, system: str, has_device_node: bool, gpu_list: str) -> str:
    """`wanted`, else `cuda` where Linux shows an NVIDIA GPU (`gpu_list`: what `nvidia-smi -L` printed), else `cpu`."""
    if wanted not in ("", "cpu", "cuda"):
        raise SetupError(f"TETHER_DEVICE must be cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and system != "Linux":
        raise SetupError(f"TETHER_DEVICE=cuda needs Linux, this is {system}; leave it unset")
    if wanted:
        return wanted
    return "cuda" if system == "Linux" and (has_device_node or "GPU " in gpu_list) else "cpu"


def must_rebuild(stamp: Mapping[str, Any], device: str, python: str | None) -> str | None:
    """Why the environment has to be made anew, or None. `python`: what its interpreter says it is, None if broken."""
    if python is None:
        return "its Python does not run, or has no pip"
    if not re.match(r"3\.1[123]\.", python):
        return f"it holds Python {python}; 3.11 to 3.13 is needed"
    if stamp.get("device", device) != device:
        return f"it was made for {stamp['device']}"
    return None


def outstanding(done: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The steps whose inputs changed since they were done, in order."""
    return [step for step in wanted if done.get(step) != wanted[step]]


def requirement(text: str, name: str) -> str:
    """The pin of one package in a requirements file, without its marker."""
    line = re.search(rf"^{re.escape(name)}==[^\s;]+", text, re.MULTILINE)
    assert line, f"{name} is not in the list"
    return line[0]


def cpu_torch(text: str) -> str | None:
    """The release of torch whose CPU build a list asks for; None when torch comes from the registry like the rest."""
    line = re.search(r"^torch==([\w.]+)\+cpu", text, re.MULTILINE)
    return line[1] if line else None


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run(title: str, *command: str | Path, **environment: str) -> None:
    """Run a command with its output in the log and a sign of life every 15 s. Raises SetupError with the log's end."""
    print(f"set-up: {title}", flush=True)
    began = time.monotonic()
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | environment
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    process.wait(timeout=15)
                    break
                except subprocess.TimeoutExpired:
                    print(f"set-up:   {time.monotonic() - began:.0f} s  {log_end(1).strip()[:100]}", flush=True)
        finally:
            process.kill()
    if process.returncode != 0:
        raise SetupError(f"{title}: exit code {process.returncode}\n{log_end(20)}\n(all of it: {LOG})")


def log_end(lines: int) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-lines:])


def pip(title: str, *arguments: str | Path) -> None:
    """Install exactly what is named: nothing is resolved, nothing is built with tools that the list does not pin."""
    fixed = ("--no-deps", "--no-build-isolation", "--no-compile", "--progress-bar", "off")
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    run(title, PYTHON, "-m", "pip", "install", *fixed, *arguments, DS_BUILD_OPS="0", **quiet)


def install_packages(requirements: Path) -> None:
    """The pinned list. deepspeed, the only source, comes before torch: with it, its build wants a CUDA toolkit."""
    text = requirements.read_text()
    pip("build tools", requirement(text, "setuptools"), requirement(text, "wheel"))
    pip("deepspeed", requirement(text, "deepspeed"))
    release = cpu_torch(text)
    if release is not None and platform.system() == "Linux":
        install_cpu_torch(release)
    count = len(re.findall(r"^\w", text, re.MULTILINE))
    pip(f"{count} packages of {requirements.relative_to(ROOT)}", "--only-binary", ":all:", "-r", requirements)


def install_cpu_torch(release: str) -> None:
    """torch without CUDA: from wherever pip is told to look, else by uv from PyTorch's own index."""
    try:
        pip(f"torch {release} for the CPU", f"torch=={release}+cpu")
    except SetupError:
        pip("uv, because pip found no CPU build of torch", UV)
        arguments = ("--no-deps", "--torch-backend", "cpu", f"torch=={release}")
        run(f"torch {release} for the CPU, by uv", PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, *arguments)


def compile_packages() -> None:
    """Bytecode on all cores, where pip takes one. What does not compile is no Python 3 and nobody imports it."""
    code = f"import compileall; compileall.compile_dir({str(site_packages())!r}, quiet=2, workers=0)"
    run("bytecode", PYTHON, "-c", code)


def warm_up(device: str) -> None:
    """Check that what was installed runs, and fill the caches that a first run would fill."""
    if device == "cuda":
        title = "first use of the GPU (it needs a driver for CUDA 13; without one: TETHER_DEVICE=cpu)"
        run(title, PYTHON, "-c", USE_CUDA)
    if (site_packages() / "vllm").is_dir():
        quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
        run("first use of vLLM", PYTHON, "-c", INSPECT_MODEL, **quiet)
    else:
        print("set-up: vLLM has no build for this platform; generators will use the slower transformers engine")


def build(device: str) -> None:
    """Bring `.venv` to what the list, pyproject.toml and this script say."""
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    reason = must_rebuild(stamp, device, python_version()) if VENV.exists() else "there is none"
    if reason is not None:
        print(f"set-up: making .venv with Python {platform.python_version()} for {device}: {reason}", flush=True)
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
        stamp = {}

    requirements = ROOT / "requirements" / ("gpu.txt" if device == "cuda" else "cpu.txt")
    packages = digest(device, str(python_version()), requirements.read_text(), Path(__file__).read_text())
    project = digest(packages, (ROOT / "pyproject.toml").read_text(), str(ROOT))
    wanted = {"packages": packages, "bytecode": packages, "warm-up": packages, "project": project}
    actions: dict[str, Callable[[], None]] = {
        "packages": lambda: install_packages(requirements),
        "bytecode": compile_packages,
        "warm-up": lambda: warm_up(device),
        "project": lambda: pip("tether itself", "-e", "."),
    }
    done = dict(stamp.get("steps", {}))
    steps, began = outstanding(done, wanted), time.monotonic()
    for step in steps:
        actions[step]()
        done[step] = wanted[step]
        STAMP.write_text(json.dumps({"device": device, "steps": done}, indent=1))
    if steps:
        print(f"set-up: .venv is ready for {device}, {time.monotonic() - began:.0f} s", flush=True)


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3*/site-packages"))


def python_version() -> str | None:
    """What the environment's interpreter says it is; None if it does not run or has no pip."""
    command = [str(PYTHON), "-c", "import pip, platform; print(platform.python_version())"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_list() -> str:
    """What nvidia-smi prints about the GPUs it sees; "" where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout


def compiler() -> str | None:
    names = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the set-up's lock, a folder that always exists; a second `make` waits for the first."""
    handle = os.open(ROOT / "requirements", os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another one that is at work here", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main() -> int:
    try:
        lacking = missing(sys.version_info[:3], importlib.util.find_spec("ensurepip") is not None, compiler())
        if lacking:
            raise SetupError("; ".join(lacking))
        wanted, has_device_node = os.environ.get("TETHER_DEVICE", ""), Path("/dev/nvidia0").exists()
        seen = "" if wanted or has_device_node else gpu_list()
        device = pick_device(wanted, platform.system(), has_device_node, seen)
        with one_at_a_time():
            build(device)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
