"""The page of the notebook: its numbers are those of the functions, its settings exist, and its runs can be planned.

What it says to type after a run: `tests/test_recipes.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.rewards import xml
from launch.cluster import main
from protocol.errors import Exit
from protocol.setting_names import known_keys
from tests.recipe_runs import settings_of
from tests.test_algorithms_page import code_spans
from tests.xml_page import NAME, PAGE, blocks, commands

REFERENCE = "4-1-1=<<4-1-1=2>>2\n#### 2"


def test_the_system_message_on_the_page_is_the_recipes() -> None:
    system = settings_of(NAME).data.system
    assert system in blocks("text")
    assert f'"""{system}"""' in blocks("python")[0]


def test_the_rewards_of_the_examples_are_what_the_functions_give() -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")
    ]
    head = next(cells for cells in lines if cells[0] == "completion")
    shown = [cells for cells in lines if cells[0].startswith('`"')]
    assert len(shown) == 4
    assert set(head[1:-1]) == {function.use for function in settings_of(NAME).rewards.functions}
    for cells in shown:
        completion = ast.literal_eval(cells[0].strip("`"))
        for name, value in zip(head[1:-1], cells[1:-1], strict=True):
            function: Callable[..., float] = getattr(xml, name)
            given = function(completion, REFERENCE) if name == "xml_correctness" else function(completion)
            assert given == pytest.approx(float(value)), (name, completion)
        assert sum(map(float, cells[1:-1])) == pytest.approx(float(cells[-1]))


def test_every_setting_on_the_page_exists() -> None:
    named = {span for span in code_spans(PAGE) if re.fullmatch(r"[a-z]+\.[a-z_]+", span)}
    assert len(named) > 15
    assert not [name for name in named if name not in known_keys() and not name.startswith("vllm.")]


def test_the_runs_of_the_page_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    starts = [words for words in commands() if words[1] == "launch/cluster.py" and "--resume" not in words]
    assert len(starts) == 2
    for words in starts:
        assert main([*words[2:], "--device", "cpu", "--dry-run"]) == Exit.DONE
        assert "4 prompts x 8 completions" in capsys.readouterr().out
