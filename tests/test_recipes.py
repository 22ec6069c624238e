"""Recipes: the arithmetic is that of what they reproduce, the plan fits the cards they name, and two real steps run.

`make recipes` runs them with real vLLM; here transformers samples.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.cluster import main
from launch.flags import parse
from launch.memory import MemorySplit
from launch.plan import Card, Devices, Paths, Process, ProcessRole, implied_settings, plan
from launch.start import RECIPES
from protocol.brought_code import shown_name
from protocol.checkpoints import latest_valid, step_of
from protocol.errors import Exit
from protocol.foreign_names import NAMES
from protocol.setting_names import known_keys
from protocol.settings import build
from tests import xml_page
from tests.recipe_runs import (
    NUM_STEPS,
    NUM_WARMUP_STEPS,
    RECIPE_NAMES,
    RESUMED,
    Run,
    cut_down,
    go_on,
    make_recipe_task,
    recipe,
    settings_of,
    start,
)
from tests.test_memory import QWEN_7B, QWEN_HALF_B

GSM8K_ROWS = 7473

pytestmark = pytest.mark.timeout(300)


class Original(NamedTuple):
    """What the reproduced command says, in its own units."""

    rows: int
    prompts: int  # of a batch
    completions: int  # of a prompt
    epochs: int = 1
    mini_batch: int = 0  # prompts; 0: the batch
    warmup_ratio: float = 0.0
    cards: int = 8


ORIGINALS = {
    "gsm8k_ppo_deepseek7b": Original(GSM8K_ROWS, 1024, 1, 15, 256),
    "gsm8k_ppo_qwen05b": Original(GSM8K_ROWS, 256, 1, 15, 64, cards=1),
    # 1 completion x 7 ranks x 2 accumulated, and 4 x 1 x 1, of 7 and of 4; 1% is held out
    "numina_grpo_qwen7b": Original(4950, 1 * 7 * 2 // 7, 7, warmup_ratio=0.05),
    "numina_grpo_qwen7b_lora": Original(990, 4 * 1 * 1 // 4, 4, warmup_ratio=0.05, cards=1),
    "gsm8k_grpo_xml": Original(GSM8K_ROWS, 1 * 4, 8, warmup_ratio=0.1, cards=1),
    "gsm8k_grpo_2_6": Original(GSM8K_ROWS, 1152, 5, 2, 192),
}
OTHER_UNITS = {
    *("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "total_epochs", "warmup_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "use_kl_loss", "kl_loss_type", "reward_funcs"),
    *("train_type", "system", "use_vllm", "filter_overlong_prompts", "val_before_train", "deepspeed"),
    *("micro_batch_size_per_gpu", "prompt_key", "response_key"),
}
"""Flags whose values are not those of the settings that do the same here."""
OWN = {"demo", "demo_calculator", "gsm8k", "gsm8k_tiny_cpu"}
"""Recipes that reproduce nobody's."""


# --- What they say ----------------------------------------------------------------------------------------------------


def test_every_recipe_reproduces_something_or_is_our_own() -> None:
    assert sorted([*ORIGINALS, *OWN]) == RECIPE_NAMES


@pytest.mark.parametrize("name", ORIGINALS)
def test_batches_updates_steps_and_warm_up_are_those_of_the_original(name: str) -> None:
    config, original = settings_of(name), ORIGINALS[name]
    assert (config.batch.prompts, config.batch.group_size) == (original.prompts, original.completions)
    assert config.algorithm.updates_per_batch == original.prompts // (original.mini_batch or original.prompts)
    assert config.run.steps == original.rows // original.prompts * original.epochs
    assert config.learner.warmup_steps == math.ceil(original.warmup_ratio * config.run.steps)
    assert config.learner.schedule == ("cosine" if original.warmup_ratio else "constant")


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_recipe_says_what_it_reproduces_with_which_flags_on_what_and_what_to_expect(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    comment = re.sub(r"\n# ?", " ", text[: text.index("\nmodel:")])
    assert f"--recipe {name}" in comment
    for word in ("what it is there:", "Otherwise:", "Expect:", "GB"):
        assert word in comment, f"{name} does not say {word}"
    assert str(settings_of(name).run.steps) in comment.replace(",", "")


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_flags_that_a_recipe_quotes_have_the_values_of_its_settings(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    quoted = re.sub(
        r"\n#     .*", "", text[text.index("what it is there:") : text.index("# Otherwise:")]
    )  # our commands
    quoted = quoted.replace("\n#", "")
    flags = re.findall(r"--([a-z_]+) ([^\s,;]+)|\b([a-z_.]+[a-z_0-9])='?([^\s,;()']+)", quoted)
    said, compared = build(recipe(name).values).config.model_dump(mode="json"), 0
    for flag, text_of_it in (((a or c), (b or d)) for a, b, c, d in flags):
        settings = {setting for full, setting in NAMES.items() if full.endswith(f".{flag}")}
        settings = {NAMES[flag]} if flag in NAMES else settings
        if flag.rpartition(".")[2] in OTHER_UNITS or not settings - {""}:
            continue
        (setting,) = settings
        there, here = _comparable(text_of_it), _at(said, setting)
        compared += 1
        assert there == here or (isinstance(here, list) and there in here) or (there, here) == (-1, 0), (flag, setting)
    assert compared >= 6


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_commands_that_a_recipe_names_are_understood(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    starts = re.findall(r"^#     python launch/cluster\.py (.*)$", text, flags=re.MULTILINE)
    assert starts
    for start_of in starts:
        command = parse(shlex.split(start_of, comments=True))
        assert command.recipe == name or (command.resume and not command.recipe)
        build(recipe(name).values, command.values)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_readme_has_the_recipe(name: str) -> None:
    assert f"`{name}`" in (RECIPES.parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_plan_of_a_recipe_takes_all_the_cards_that_it_names(name: str) -> None:
    cards = ORIGINALS[name].cards
    devices = Devices("cuda", 16, tuple(Card(str(i), "card", 80 << 30) for i in range(cards)))
    made = _planned(name, devices)
    used = {card for process in made for card in process.env["CUDA_VISIBLE_DEVICES"].split(",") if card}
    assert used == {str(i) for i in range(cards)}
    config = settings_of(name)
    assert len(made) == 1 + config.learner.ranks + config.generators.count


@pytest.mark.parametrize("name", [name for name, original in ORIGINALS.items() if original.cards == 1])
def test_a_recipe_of_one_card_has_room_on_the_card_that_it_names(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    commands = re.findall(r"^#     python launch/cluster\.py (.*?) +# one card of (\d+) GB$", text, flags=re.MULTILINE)
    assert commands
    for command, size in commands:
        settings = build(recipe(name).values, parse(shlex.split(command)).values)
        shape = QWEN_7B if "7B" in settings.config.model.path else QWEN_HALF_B
        card = Card("0", "card", int(size) << 30)
        settings = settings.override(implied_settings(settings.config, Devices("cuda", 16, (card,)), shape))
        split = MemorySplit.of(settings.config, shape, card.memory_bytes)
        split.check()
        assert "too little" not in dict(split.notes())["  left"], f"{command}: {split.notes()}"


def test_the_quickstart_on_an_npu_is_the_same_recipe_with_another_device() -> None:
    made = _planned("gsm8k_ppo_qwen05b", Devices("npu", 16, (Card("3", "Ascend 910B", 64 << 30),)))
    computing = [process for process in made if process.role is not ProcessRole.BROKER]
    assert [process.device for process in computing] == ["npu 3"] * 2
    assert {process.env["ASCEND_RT_VISIBLE_DEVICES"] for process in computing} == {"3"}


def test_a_system_message_lies_beside_its_recipe_wherever_the_command_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "say.txt").write_text("Answer in verse.\n")
    (own / "verse.yaml").write_text("data: {system: say.txt}\n")
    for folder, named in ((tmp_path, "own/verse.yaml"), (own, "verse.yaml")):
        monkeypatch.chdir(folder)
        assert main(["--recipe", named, "--device", "cpu", "--dry-run", "--json"]) == Exit.DONE
        assert json.loads(capsys.readouterr().out)["settings"]["data"]["system"] == str(own / "say.txt")


def test_the_system_message_of_numina_is_that_of_deepseek_r1() -> None:
    text = (RECIPES / settings_of("numina_grpo_qwen7b").data.system).read_text(encoding="utf-8")
    assert text.startswith("A conversation between User and Assistant. The user asks a question")
    assert text.endswith("<think> reasoning process here </think><answer> answer here </answer>\n")


def _planned(name: str, devices: Devices) -> tuple[Process, ...]:
    settings = build(recipe(name).values)
    settings = settings.override(implied_settings(settings.config, devices))
    return plan(settings.config, devices, Paths(Path("/repository"), Path("/runs/one"), "python", 29500)).processes


# --- What they do -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe_task(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module", params=RECIPE_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(name: str, task: Path, recipe_engine: str) -> Run:
    """One start of all processes, for all tests of this recipe."""
    return start(name, task, recipe_engine)


def test_two_steps_run_and_every_step_updates_the_weights(run: Run) -> None:
    assert [row["step"] for row in run.steps] == list(range(NUM_STEPS))
    updates = run.config.algorithm.updates_per_batch
    assert [row["policy/updates"] for row in run.steps] == [updates] * NUM_STEPS
    assert all(row["policy/lr"] > 0 for row in run.steps)


def test_a_run_has_all_that_its_recipe_says_but_sizes_and_places(run: Run, name: str, task: Path) -> None:
    ran, said = run.config.model_dump(), settings_of(name).model_dump()
    changed = set(cut_down(name, task, "")) | {"run.name", "run.out", "data.system", "model.path"}
    changed |= {"data.train", "data.eval", "warmup.data"} if recipe(name).make.startswith("demo") else set()
    differs = {key for key in known_keys() if _at(ran, key) != _at(said, key)}
    assert differs <= changed
    assert ran["vllm"] == said["vllm"]


def test_the_curves_are_those_of_the_recipe(run: Run) -> None:
    config, last = run.config, run.steps[-1]
    functions = [shown_name(function.use) for function in config.rewards.functions]
    assert {f"reward/{function}" for function in functions} <= last.keys()
    weighed = sum(f.weight * last[f"reward/{shown_name(f.use)}"] for f in config.rewards.functions)
    assert weighed == pytest.approx(last["reward/mean"], abs=1e-5)
    assert ({"critic/loss", "critic/explained_variance", "critic/lr"} <= last.keys()) == (
        config.algorithm.advantage == "gae"
    )
    assert ("policy/kl_reference" in last) == (config.kl.coef > 0)
    assert last.get("policy/kl_coef", 0.0) == config.kl.coef


def test_the_held_out_rows_are_asked_before_and_after_and_as_often_as_the_recipe_says(run: Run) -> None:
    versions = [v for v in range(NUM_STEPS + 1) if v % run.config.evaluation.every == 0 or v == NUM_STEPS]
    assert [row["version"] for row in run.evaluations] == versions
    assert all(0.0 <= row["accuracy"] <= 1.0 for row in run.evaluations)


def test_the_run_leaves_a_checkpoint_that_verifies(run: Run) -> None:
    found = latest_valid(run.folder / "checkpoints")
    assert found.path is not None
    assert step_of(found.path) == NUM_STEPS
    assert (found.path / "adapter").is_dir() == (run.config.lora.rank > 0)


def test_supervised_steps_come_first_where_the_recipe_has_them(run: Run) -> None:
    losses = [row["warmup/loss"] for row in run.metrics if "warmup/loss" in row]
    assert len(losses) == run.config.warmup.steps
    assert run.config.warmup.steps in (0, NUM_WARMUP_STEPS)


@pytest.mark.parametrize("name", [xml_page.NAME], indirect=True)
@pytest.mark.usefixtures("run")
def test_what_the_page_of_the_notebook_says_to_type_after_a_run_does_run(task: Path) -> None:
    xml_page.check_what_follows_the_training(task)


@pytest.mark.parametrize("name", [RESUMED], indirect=True)
def test_the_one_card_recipe_goes_on_where_it_stopped(run: Run, name: str, task: Path) -> None:
    again = go_on(name, task, NUM_STEPS + 1)
    assert [row["step"] for row in again.steps] == list(range(NUM_STEPS + 1))
    assert again.evaluations[0] == run.evaluations[0]
    assert again.evaluations[-1]["version"] == NUM_STEPS + 1


def _comparable(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _at(settings: dict[str, object], key: str) -> object:
    value: object = settings
    for name in key.split("."):
        assert isinstance(value, dict)
        value = value[name]
    return value
