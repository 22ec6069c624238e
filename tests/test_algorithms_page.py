"""That docs/algorithms.md is about the settings, values and files that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from protocol.algorithm import AlgorithmConfig, CorrectionsConfig, CriticConfig, KlConfig, LoraConfig
from protocol.config import Config
from protocol.sections import Section

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()
SECTIONS: dict[str, type[Section]] = {
    "algorithm": AlgorithmConfig,
    "kl": KlConfig,
    "corrections": CorrectionsConfig,
    "critic": CriticConfig,
    "lora": LoraConfig,
}
SETTINGS = [f"{section}.{name}" for section, fields in SECTIONS.items() for name in fields.model_fields]
RECIPES = {
    "Two-policy PPO",
    "LoRA",
    "GRPO",
    "Dr. GRPO",
    "DAPO",
    "RLOO",
    "REINFORCE++",
    "GDPO",
    "ReMax",
    "PPO",
    "GSPO",
    "CISPO",
    "SAPO",
    "DPPO",
}
RECIPES |= {"Decoupled PPO", "TIS", "IcePop"}


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def rows(page: str) -> dict[str, list[str]]:
    """Cells of the table rows that begin with a setting, by its name."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if match := re.match(r"\| `([a-z_]+\.[a-z_]+)` \|", line):
            assert match[1] not in found, f"{match[1]} has two rows"
            found[match[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    return found


def recipes(page: str) -> list[tuple[str, dict[str, Any]]]:
    """(the bold name that stands before it, settings) of each yaml block; one without a name has its predecessor's."""
    found, name = [], ""
    for bold, block in re.findall(r"^\*\*(.+?)\*\*|```yaml\n(.*?)```", page, flags=re.MULTILINE | re.DOTALL):
        if bold:
            name = bold
        else:
            found.append((name, yaml.safe_load(block)))
    return found


def shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


def test_the_page_has_a_row_for_every_setting_and_for_nothing_else() -> None:
    assert sorted(rows(PAGE)) == sorted(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_row_has_every_value_and_the_default(setting: str) -> None:
    section, _, name = setting.partition(".")
    field = SECTIONS[section].model_fields[name]
    _, values, default, *_ = rows(PAGE)[setting]
    if get_origin(field.annotation) is Literal:
        assert code_spans(values) == list(get_args(field.annotation))
    assert code_spans(default) == ([shown(field.default)] if field.default != "" else [])


def test_every_setting_that_the_page_names_exists() -> None:
    spans = [span.split(":")[0] for span in code_spans(PAGE) if re.match(r"[a-z]+\.[a-z_]+(:|$)", span)]
    ours = Config().model_dump()
    named = [span.split(".") for span in spans if span.split(".")[0] in ours]
    assert len(named) > len(SETTINGS)
    assert not [(section, name) for section, name in named if name not in ours[section]]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_accepted_by_the_settings(name: str) -> None:
    found = [settings for title, settings in recipes(PAGE) if title == name]
    assert found, f"no recipe called {name}"
    for settings in found:
        Config.model_validate(settings)


def test_every_recipe_is_looked_at() -> None:
    assert {name for name, _ in recipes(PAGE)} == RECIPES


def test_every_file_that_the_page_names_exists() -> None:
    files = [span for span in code_spans(PAGE) if re.fullmatch(r"[\w/]+/[\w]+\.\w+", span)]
    assert len(files) > 30
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_every_curve_that_the_page_names_is_one() -> None:
    metrics = (ROOT / "learner" / "metrics.py").read_text()
    curves = set(re.findall(r"\b(?:mismatch|policy)/\w+", PAGE))
    assert curves
    assert not [curve for curve in curves if f'"{curve}"' not in metrics]
