"""The page of the notebook, docs/gsm8k_grpo_xml.md: its blocks, and what it says to type once a run is over."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from protocol.errors import Exit
from tests.recipe_runs import NUM_STEPS

ROOT = Path(__file__).resolve().parents[1]
NAME = "gsm8k_grpo_xml"
PAGE = (ROOT / "docs" / f"{NAME}.md").read_text(encoding="utf-8")
COMMAND_S = 90.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def check_what_follows_the_training(folder: Path) -> None:
    """Type what the page says of a run, in the folder that has it below runs/; only the number of its steps differs."""
    follow = [words for words in commands() if words[1] != "launch/cluster.py" or "--resume" in words]
    assert [words[1] for words in follow] == ["tools/samples.py", "launch/cluster.py", "tools/export.py"]
    for words in follow:
        here = [word.replace("step_1868", f"step_{NUM_STEPS}") for word in words[2:]]
        said = _typed(folder, str(ROOT / words[1]), *here, *(["--dry-run"] if "--resume" in words else []))
        assert said.returncode == Exit.DONE, said.stderr
    asked = _typed(folder, "-c", blocks("python")[0])
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()


def _typed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_S, check=False)
