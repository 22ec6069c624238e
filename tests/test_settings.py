"""The layers of settings, where each value came from, and what is said about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protocol.brought_code import shown_name
from protocol.codec import Header, decode, encode
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.messages import Beat, Result
from protocol.setting_names import describe, known_keys
from protocol.settings import Value, build, from_environment, from_text, load, read_recipe, read_saved

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """\
# a comment, so that lines count
model: {path: some/model}
learner:
  learning_rate: 2e-6
  zero: 1
rewards:
  functions:
    - {use: gsm8k, weight: 2}
vllm:
  max_model_len: 512
  compilation_config: {level: 0, mode: fast}
deepspeed:
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def message(*layers: list[Value]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*layers)
    return str(caught.value)


def test_without_layers_everything_has_its_default() -> None:
    settings = build()
    assert settings.config == Config()
    assert settings.origin("learner.zero") == "default"


def test_a_later_layer_wins_and_the_origin_says_which(recipe: Path) -> None:
    environment = from_environment({"TETHER__LEARNER__ZERO": "2", "TETHER__BATCH__PROMPTS": "4", "HOME": "/"})
    flags = [from_text("batch.prompts", "6", "--prompts-per-step")]
    settings = build(read_recipe(recipe).values, environment, flags)
    assert (settings.config.learner.learning_rate, settings.origin("learner.learning_rate")) == (2e-6, f"{recipe}:4")
    assert (settings.config.learner.zero, settings.origin("learner.zero")) == (2, "TETHER__LEARNER__ZERO")
    assert (settings.config.batch.prompts, settings.origin("batch.prompts")) == (6, "--prompts-per-step")


def test_a_flag_reaches_into_a_pass_through_section_without_wiping_it(recipe: Path) -> None:
    flags = [from_text("vllm.compilation_config.level", "3", "--vllm.compilation_config.level")]
    settings = build(read_recipe(recipe).values, flags)
    assert settings.config.vllm == {"max_model_len": 512, "compilation_config": {"level": 3, "mode": "fast"}}
    assert settings.origin("vllm.compilation_config") == f"--vllm.compilation_config.level, {recipe}:11"


def test_a_pass_through_value_replaces_a_mapping(recipe: Path) -> None:
    settings = build(read_recipe(recipe).values, [from_text("vllm.compilation_config", "off", "--x")])
    assert settings.config.vllm["compilation_config"] is False


def test_text_settings_are_not_read_as_yaml_and_others_are() -> None:
    settings = build([from_text("run.name", "2024", "--run-name"), from_text("learner.betas", "[0.9, 0.95]", "--x")])
    assert settings.config.run.name == "2024"
    assert settings.config.learner.betas == (0.9, 0.95)


def test_exponents_without_a_dot_are_numbers_in_pass_through_sections_too() -> None:
    assert build([from_text("deepspeed.a.b", "1e-5", "--x")]).config.deepspeed == {"a": {"b": 1e-5}}


def test_what_was_saved_is_loaded_again_with_its_origins(recipe: Path, tmp_path: Path) -> None:
    settings = build(read_recipe(recipe).values, [from_text("data.suffix", "two\nlines  # none", "--data.suffix")])
    settings.save(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == settings.config
    again = build(read_saved(tmp_path / "config.yaml"))
    assert again.origin("learner.learning_rate") == f"{recipe}:4"
    assert again.origin("data.suffix") == "--data.suffix"
    assert again.origin("batch.prompts") == "default"


def test_a_recipe_may_say_what_must_be_made(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("make: demo\nbatch: {prompts: 3}\n")
    recipe = read_recipe(path)
    assert recipe.make == "demo"
    assert [(value.key, value.value) for value in recipe.values] == [("batch.prompts", 3)]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learner.lrate", "learner.learning_rate"),
        ("learner.lr", "learner.learning_rate"),
        ("leaner.zero", "learner.zero"),
        ("group_size", "batch.group_size"),
        ("batch.groupsize", "batch.group_size"),
        ("stalness.max", "staleness.max"),
        ("lora_rank", "lora.rank"),
        ("critic_learning_rate", "critic.learning_rate"),
    ],
)
def test_an_unknown_setting_names_the_nearest_known_one(key: str, meant: str) -> None:
    assert message([from_text(key, "1", f"--{key}")]) == f"{key} is not a setting (--{key}); did you mean {meant}?"


def test_an_unknown_setting_of_a_recipe_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("batch:\n  prompts: 3\nlearner:\n  lrate: 1\n")
    assert f"learner.lrate is not a setting ({path}:4)" in message(read_recipe(path).values)


def test_an_unknown_setting_of_the_environment_is_named_as_it_was_written() -> None:
    said = message(from_environment({"TETHER__LEARNER__LRATE": "1"}))
    assert said.startswith("learner.lrate is not a setting (TETHER__LEARNER__LRATE)")


def test_an_unknown_name_inside_a_list_is_found() -> None:
    said = message([from_text("rewards.functions", "[{use: gsm8k, weigth: 2}]", "--rewards.functions")])
    assert "rewards.functions.0.weigth is not a setting" in said
    assert "did you mean rewards.functions.weight?" in said


def test_a_missing_name_inside_a_list_is_found() -> None:
    said = message([from_text("rewards.functions", "[{weight: 2}]", "--x")])
    assert said.startswith("rewards.functions.0.use is required and was not given (--x)")


def test_a_value_out_of_range_says_rule_value_origin_and_meaning() -> None:
    said = message([from_text("learner.zero", "5", "--zero")])
    assert said == "learner.zero must be less than or equal to 3, got 5 (--zero); it means: DeepSpeed's ZeRO stage."


def test_a_word_that_is_not_allowed_lists_the_allowed_ones() -> None:
    said = message([from_text("staleness.at_bound", "drop", "--x")])
    assert said.startswith("staleness.at_bound must be 'wait' or 'split', got 'drop' (--x)")


def test_every_wrong_value_is_reported_at_once() -> None:
    said = message([from_text("learner.zero", "9", "--zero"), from_text("batch.prompts", "0", "--prompts-per-step")])
    assert len(said.splitlines()) == 2


def test_a_rule_between_settings_names_where_the_setting_was_given() -> None:
    said = message([from_text("batch.group_size", "1", "--group-size")])
    assert said.startswith("group_size must be at least 2 for group-relative advantages, got 1; set batch.group_size")
    assert said.endswith("(--group-size)")


def test_truncated_sampling_is_refused() -> None:
    assert "truncated sampling (vllm.top_p) is refused" in message([from_text("vllm.top_p", "0.9", "--vllm.top_p")])


def test_a_value_for_a_whole_section_is_refused_with_its_settings() -> None:
    said = message([from_text("model", "x", "--model")])
    assert said.startswith("model is a group of settings, got 'x' (--model); set model.path")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch: {prompts: [}\n", "expected YAML"),
        ("- a\n", "expected sections with settings, got list"),
        ("batch: {prompts: 1, prompts: 2}\n", "'prompts' is written twice"),
    ],
)
def test_a_broken_recipe_says_what_is_wrong_and_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "config.yaml")


def test_every_setting_says_what_it_means() -> None:
    assert [key for key in known_keys() if not describe(key)] == []


def test_settings_load_without_any_heavy_library() -> None:
    heavy = ("torch", "vllm", "deepspeed", "transformers", "zmq", "rich")
    code = f"import sys, protocol.settings; sys.exit(', '.join(set({heavy}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert result.stderr.strip() in ("", "0")


def functions(*uses: str) -> list[Value]:
    return [Value("rewards.functions", [{"use": use} for use in uses], "--reward")]


def test_what_a_message_could_not_carry_is_refused_before_anything_runs() -> None:
    said = message(functions(*(f"r.py:f{n}" for n in range(65))))
    assert said.startswith("at most 64 reward functions can be told apart, got 65; let one function return the sum")
    said = message(functions("gsm8k", f"folder/{'r' * 100}.py:{'n' * 28}"))
    assert said.startswith(f"a reward's name may have 128 characters, got 129: {'r' * 40}...; give the function or")
    said = message([from_text("generators.max_running", "4097", "--max-running")])
    assert said.startswith("generators.max_running must be less than or equal to 4096, got 4097 (--max-running)")
    assert "start more generators" in said


def test_several_greedy_completions_of_a_held_out_prompt_are_refused() -> None:
    said = message([Value("evaluation.samples", 8, "--samples")])
    assert said.startswith("evaluation.samples 8 with evaluation.temperature 0 would be the same completion every time")
    assert build([Value("evaluation.samples", 8, "a"), Value("evaluation.temperature", 0.7, "b")]).config.evaluates


def test_a_function_of_evaluations_has_no_weight_and_a_name_of_its_own() -> None:
    strict, lenient = Value("rewards.functions", [{"use": "gsm8k"}], "a"), {"use": "gsm8k_flexible", "weight": 0.5}
    assert "are no part of a sum, gsm8k_flexible has weight 0.5" in message(
        [Value("evaluation.rewards", [lenient], "b")]
    )
    twice = Value("evaluation.rewards", [{"use": "gsm8k", "args": {"format_score": 0.1}}], "b")
    assert "got two called gsm8k; rename one of them in rewards.functions or evaluation.rewards" in message(
        [strict, twice]
    )


def test_what_training_scores_with_too_is_called_once() -> None:
    lenient = {"use": "gsm8k_flexible"}
    beside = Config.model_validate(
        {"rewards": {"functions": [lenient | {"weight": 0.5}]}, "evaluation": {"rewards": [lenient]}}
    )
    assert beside.all_rewards == beside.rewards


def test_what_evaluations_sample_and_score_is_part_of_the_digest_and_how_often_they_come_is_not() -> None:
    plain = Config().result_digest()
    changes = {"samples": 2, "temperature": 1.0, "max_tokens": 9, "rewards": [{"use": "gsm8k_flexible"}]}
    for name, value in changes.items():
        settings = {"temperature": 0.5} | {name: value}
        assert Config.model_validate({"evaluation": settings}).result_digest() != plain
    often = {"every": 1, "max_prompts": 9, "before_training": False, "prompts_written": 0}
    assert Config.model_validate({"evaluation": often}).result_digest() == plain


def test_what_the_settings_allow_fits_the_messages() -> None:
    uses = [f"folder/{'r' * 100}.py:{n:027}" for n in range(64)]
    built = build(functions(*uses), [from_text("generators.max_running", "4096", "--max-running")]).config
    rewards = {shown_name(function.use): 1.0 for function in built.rewards.functions}
    nothing = {"tokens": np.zeros(0, np.int32), "behavior_logprobs": np.zeros(0, np.float32)}
    result = Result(epoch=1, prompt=1, attempt=1, sample=0, rewards=rewards, observed=np.zeros(0, np.bool_), **nothing)
    beat = Beat(state="generating", leases=[(n, n, n) for n in range(built.generators.max_running)])
    for sent in (result, beat):
        decode([bytes(frame) for frame in encode(sent, Header(1, 1, 1))])
