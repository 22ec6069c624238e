"""That docs/environments.md is true: its example runs as it stands there, and what it names is there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from actors.conversation import Conversation
from actors.sample_engine import SampleEngine
from protocol.setting_names import known_keys
from tests.rollouts import Bench

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "environments.md").read_text()


def example() -> str:
    """The indented block that begins with guess.py."""
    block = PAGE[PAGE.index("    # guess.py") :]
    return textwrap.dedent(re.split(r"\n(?=\S)", block)[0].partition("\n    python launch")[0])


def test_the_pages_example_plays_as_it_stands(tmp_path: Path) -> None:
    code = example()
    (tmp_path / "guess.py").write_text(code)
    settings = {"use": f"{tmp_path / 'guess.py'}:guess", "weight": 1.0, "args": {"tries": 2}}
    bench = Bench(tmp_path / "run", rollout=settings)
    found = {episode.reward for episode in bench.play(*range(30))}
    assert 0.0 in found
    assert found & {1.0, 0.5}, "some sample names w7 among its eight words of fifty"
    assert found <= {1.0, 0.5, 0.0}


def test_what_the_page_names_is_there() -> None:
    settings = set(re.findall(r"`(?:--)?((?:rollout|rewards|sampling)\.[a-z_]+)[` ]", PAGE))
    assert {"rollout.weight", "rollout.timeout_s", "sampling.max_tokens"} <= settings <= set(known_keys())
    for file in re.findall(r"`([a-z]+/[a-z_/]+\.py)`", PAGE):
        assert (ROOT / file).is_file()
    for name in re.findall(r"`(?:await )?talk\.([a-z_]+)", PAGE):
        assert hasattr(Conversation, name), name
    for name in re.findall(r"`(?:await )?engine\.([a-z]+)\(", PAGE):
        assert hasattr(SampleEngine, name), name
