"""Names that other systems have for our settings: each leads to a setting that exists, and the hint says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.flags import OWN, parse
from protocol.errors import ConfigError
from protocol.foreign_names import NAMES, OPENRLHF, REWARDS, SWIFT_AND_TRL, VERL, setting_of
from protocol.rewards import BUILT_IN
from protocol.setting_names import PASS_THROUGH, known_keys
from protocol.settings import Value, build
from tests.test_algorithms_page import code_spans

ROOT = Path(__file__).resolve().parents[1]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--epsilon_high", "0.28"), "--algorithm.clip_high"),
        (("--num-generations", "8"), "--batch.group_size"),
        (("--beta=0.04",), "--kl.coef"),
        (("--lr", "1e-6"), "--learner.learning_rate"),
        (("--actor_rollout_ref.rollout.n=5",), "--batch.group_size"),
        (("data.train_batch_size=1024",), "--batch.prompts"),
        (("--n_samples_per_prompt", "8"), "--batch.group_size"),
        (("--trainer.resume_mode", "auto"), "--resume"),
    ],
)
def test_a_flag_of_another_system_is_told_by_its_name_here(words: tuple[str, ...], meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(*words)


def test_a_whole_command_of_another_system_is_answered_at_once() -> None:
    swift = "--rlhf_type grpo --model M --reward_funcs accuracy format --use_vllm true --num_generations 7"
    said = refusal(*swift.split()).splitlines()
    assert [line.split()[0] for line in said] == ["--rlhf_type", "--reward_funcs", "--use_vllm", "--num_generations"]
    verl = "data.train_batch_size=256 run.steps=3 trainer.logger=console --genrators 2 run_name=a"
    said = refusal(*verl.split()).splitlines()
    assert [line.split()[0] for line in said] == [
        "--data.train_batch_size",
        "--trainer.logger",
        "--genrators",
        "--run_name",
    ]
    assert "did you mean --run.name?" in said[-1]


def test_a_name_that_means_something_else_here_sends_to_the_page() -> None:
    for name in (
        "--per_device_train_batch_size",
        "critic.ppo_micro_batch_size_per_gpu=4",
        "data.max_prompt_length=512",
    ):
        assert refusal(name).endswith("docs/coming_from.md says how they differ")
        assert "did you mean --" in refusal(name)
    assert refusal("--lora_rank", "8").endswith("did you mean --lora.rank?")


def test_a_flag_that_nothing_is_like_sends_to_the_page() -> None:
    assert refusal("--report_to", "none").endswith("there is none like it: docs/coming_from.md says what to do instead")


def test_a_recipe_with_another_systems_name_is_told_too() -> None:
    with pytest.raises(
        ConfigError, match=r"num_generations is not a setting \(r\.yaml:1\); did you mean batch\.group_"
    ):
        build([Value("num_generations", 8, "r.yaml:1")])


def test_a_preset_of_deepspeed_is_sent_to_the_stage() -> None:
    with pytest.raises(ConfigError, match=r"deepspeed is a group of settings, got 'zero2'.*set learner\.zero, "):
        build(parse(["--deepspeed", "zero2"]).values)


def test_every_name_leads_to_a_setting_a_flag_or_to_none() -> None:
    for name, setting in NAMES.items():
        exists = setting in known_keys() or setting.split(".")[0] in PASS_THROUGH or f"--{setting}" in OWN
        assert exists or setting == "", f"{name}: {setting}"


def test_a_reward_of_another_system_is_the_one_that_the_page_of_rewards_has_beside_it() -> None:
    cells = [line.strip("|").split("|") for line in (ROOT / "docs" / "rewards.md").read_text().splitlines()]
    pairs = {(there, cell[0].strip(" `")) for cell in cells if len(cell) == 4 for there in code_spans(cell[3])}
    assert set(REWARDS.items()) <= pairs
    assert set(REWARDS.values()) <= set(BUILT_IN)


def test_no_name_is_a_setting_of_ours_or_in_two_tables() -> None:
    assert not set(NAMES) & set(known_keys())
    assert len(NAMES) == len(VERL) + len(SWIFT_AND_TRL) + len(OPENRLHF)


def test_dashes_count_as_underscores_and_a_name_of_nobody_is_unknown() -> None:
    assert setting_of("--num-generations") == setting_of("num_generations") == "batch.group_size"
    assert setting_of("--genrators") is None
