"""Who may import whom, where each heavy library lives, and that nothing pickles: read from the source of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("protocol", "broker", "actors", "learner", "launch", "tools")

# What a package may import beside itself. The mains of launch and tools follow a rule of their own, further down.
BELOW: Mapping[str, set[str]] = {
    "protocol": set(),
    "broker": {"protocol"},
    "actors": {"protocol"},
    "learner": {"protocol"},
}

# Where each heavy library lives. A new place needs a reason: every place is one more to read when the library changes.
HOMES: Mapping[str, set[str]] = {
    "vllm": {"actors/vllm_engine.py", "actors/weight_plugin.py"},  # the plugin runs inside vLLM's worker
    "deepspeed": {"learner/deepspeed_engine.py"},
    "peft": {"learner/lora.py"},
    "tensorboard": {"learner/metrics.py"},
    "datasets": {"broker/dataset.py"},
    "math_verify": {"actors/rewards/math_accuracy.py"},
    "matplotlib": {"launch/summary.py"},
    "rich": {"launch/console.py", "launch/frames.py"},
    "zmq": {
        "protocol/sockets.py",
        "protocol/channel.py",
        "protocol/keys.py",
        "broker/server.py",  # the poll loop
    },
}

# Importing these must not bring any of HEAVY: they answer at once, and the broker runs where there is no torch.
LIGHT = ("protocol", "broker", "launch")
HEAVY = ("torch", "vllm", "deepspeed", "transformers")

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "copyreg"}
PICKLING_CALLS = {"send_pyobj", "recv_pyobj", "all_gather_object", "gather_object", "ProcessPoolExecutor"}
PICKLING_CALLS |= {f"{verb}_object_list" for verb in ("broadcast", "scatter", "send", "recv")}
PLAIN_MULTIPROCESSING = {"parent_process", "active_children", "cpu_count", "shared_memory"}  # the rest pickles


def imported(source: str) -> set[str]:
    """Dotted names of everything a module imports, wherever in it; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def library(name: str) -> str:
    """The distribution's import name; torch's TensorBoard writer is tensorboard in all but name."""
    return "tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0]


def pickling(source: str) -> Iterator[str]:
    """Every place of a module that serialises by pickle, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                used = {alias.name.partition(".")[0] for alias in names} & PICKLERS
            case ast.ImportFrom(module="multiprocessing", names=names):
                used = {alias.name for alias in names} - PLAIN_MULTIPROCESSING
            case ast.ImportFrom(module=str(module), names=names):
                used = ({module.partition(".")[0]} & PICKLERS) | ({alias.name for alias in names} & PICKLING_CALLS)
            case ast.Attribute(value=ast.Name("torch"), attr="load" | "save" as attr):
                used = {f"torch.{attr}"}
            case ast.Attribute(value=ast.Name("multiprocessing"), attr=attr):
                used = {attr} - PLAIN_MULTIPROCESSING
            case ast.Attribute(attr=attr):
                used = {attr} & PICKLING_CALLS
            case ast.keyword(arg="allow_pickle", value=ast.Constant(True)):
                used = {"allow_pickle"}
            case _:
                continue
        yield from (f"{node.lineno}: {name}" for name in sorted(used))


@cache
def modules() -> dict[str, str]:
    """Path relative to the root -> source, of every module that belongs to the house."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def foreign_packages(path: str, source: str) -> set[str]:
    own = path.partition("/")[0]
    return {library(name) for name in imported(source)} & set(PACKAGES) - {own}


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down(package: str) -> None:
    mine = {path: source for path, source in modules().items() if path.startswith(f"{package}/")}
    wrong = {path: up for path, source in mine.items() if (up := foreign_packages(path, source) - BELOW[package])}
    assert mine
    assert not wrong, f"{package} may import {BELOW[package] or 'nobody'} only"


def test_a_main_imports_one_package_beside_its_own() -> None:
    mains = {path: source for path, source in modules().items() if path.startswith(("launch/", "tools/"))}
    wrong = {
        path: more for path, source in mains.items() if len(more := foreign_packages(path, source) - {"protocol"}) > 1
    }
    assert mains
    assert not wrong, "a main in launch or tools imports the one package it starts; others it starts as processes"


@pytest.mark.parametrize("name", HOMES)
def test_a_heavy_library_stays_in_its_files(name: str) -> None:
    users = {path for path, source in modules().items() if name in map(library, imported(source))}
    assert users == HOMES[name]


def test_nothing_pickles() -> None:
    found = {path: places for path, source in modules().items() if (places := list(pickling(source)))}
    assert not found


def test_light_packages_load_without_torch() -> None:
    names = [path.removesuffix(".py").replace("/", ".") for path in modules() if path.startswith(LIGHT)]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    heavy = set({HEAVY}) & set(sys.modules)
    assert not heavy, f"{{name}} brought {{heavy}}"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_an_import_inside_a_function_counts() -> None:
    source = "def later():\n    from vllm.outputs import RequestOutput\n    import torch.utils.tensorboard"
    assert {library(name) for name in imported(source)} == {"vllm", "tensorboard"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import dumps",
        "import torch\ntorch.save({}, 'x')",
        "dist.broadcast_object_list([1])",
        "from concurrent.futures import ProcessPoolExecutor",
        "import multiprocessing\nmultiprocessing.Queue()",
        "numpy.load('x', allow_pickle=True)",
        "socket.recv_pyobj()",
    ],
)
def test_every_way_to_pickle_is_seen(source: str) -> None:
    assert list(pickling(source))
