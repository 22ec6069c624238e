"""The page of other systems' flags: every flag of the tutorials is on it, and every setting that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.flags import GROUPS, OWN
from learner.metrics import CURVES
from learner.states import State
from protocol.foreign_names import NAMES, PAGE
from protocol.setting_names import PASS_THROUGH, known_keys
from tests.test_algorithms_page import code_spans

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
TUTORIALS = ROOT.parent / "shared" / "seeds"

VERL = """
    data.train_files data.val_files data.train_batch_size data.max_prompt_length data.max_response_length
    data.prompt_key data.response_key data.micro_batch_size_per_gpu model.partial_pretrain actor_rollout_ref.model.path
    actor_rollout_ref.model.use_remove_padding actor_rollout_ref.model.enable_gradient_checkpointing
    actor_rollout_ref.actor.optim.lr actor_rollout_ref.actor.ppo_mini_batch_size
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu actor_rollout_ref.actor.fsdp_config.param_offload
    actor_rollout_ref.actor.fsdp_config.optimizer_offload actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.rollout.tensor_model_parallel_size actor_rollout_ref.rollout.name
    actor_rollout_ref.rollout.gpu_memory_utilization actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.ref.fsdp_config.param_offload critic.optim.lr critic.model.use_remove_padding critic.model.path
    critic.model.enable_gradient_checkpointing critic.ppo_micro_batch_size_per_gpu
    critic.model.fsdp_config.param_offload critic.model.fsdp_config.optimizer_offload algorithm.kl_ctrl.kl_coef
    trainer.critic_warmup trainer.logger trainer.project_name trainer.experiment_name trainer.n_gpus_per_node
    trainer.nnodes trainer.save_freq trainer.test_freq trainer.total_epochs trainer.default_hdfs_dir trainer.device
    trainer.val_before_train trainer.val_only trainer.resume_mode trainer.resume_from_path --local_dir --local_save_dir
    """
SWIFT = """
    rlhf_type model reward_funcs reward_weights reward_model external_plugins use_vllm vllm_device
    vllm_gpu_memory_utilization vllm_max_model_len train_type torch_dtype dataset max_completion_length num_train_epochs
    per_device_train_batch_size per_device_eval_batch_size learning_rate gradient_accumulation_steps eval_steps
    save_steps save_total_limit logging_steps max_length output_dir warmup_ratio dataloader_num_workers dataset_num_proc
    num_generations temperature system deepspeed log_completions lora_rank lora_alpha target_modules
    ds3_gather_for_generation num_iterations epsilon report_to cosine_min_len_value_wrong cosine_max_len_value_wrong
    cosine_min_len_value_correct cosine_max_len_value_correct cosine_max_len repetition_n_grams repetition_max_penalty
    """
TRL = """
    output_dir run_name learning_rate adam_beta1 adam_beta2 weight_decay warmup_ratio lr_scheduler_type logging_steps
    bf16 per_device_train_batch_size gradient_accumulation_steps num_generations max_prompt_length max_completion_length
    num_train_epochs save_steps max_grad_norm log_on_each_node use_vllm vllm_gpu_memory_utilization vllm_device
    report_to model processing_class reward_funcs train_dataset peft_config torch_dtype device_map
    """
VARIABLES = """
    CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES NPROC_PER_NODE PYTHONUNBUFFERED VERL_USE_MODELSCOPE
    """
TUTORIAL_FLAGS = sorted({*VERL.split(), *SWIFT.split(), *TRL.split(), *VARIABLES.split()})

NOT_FLAGS = {"local-dir", "local-dir-use-symlinks", "no-cache-dir", "no-deps"}
"""Of pip and of the download commands."""
NOT_SETTINGS = {"trainer.fsdp_sft_trainer", "trainer.main_ppo", "data.pt", "SYSTEM_PROMPT", "XML_COT_FORMAT"}
"""Modules, a file, and what the notebook calls its texts."""
OF_AN_INSTALLATION = {"NVTE_FRAMEWORK", "USE_MEGATRON"}


def rows() -> list[tuple[list[str], str]]:
    """(names there, the cell that says what it is here) of each row."""
    cells = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| `")]
    return [(code_spans(cell[0]), cell[1]) for cell in cells]


@pytest.mark.parametrize("flag", TUTORIAL_FLAGS)
def test_every_flag_of_the_tutorials_is_on_the_page(flag: str) -> None:
    assert any(flag in names for names, _ in rows())


def test_the_list_has_every_flag_that_the_tutorials_show() -> None:
    if not TUTORIALS.is_dir():
        pytest.skip("the tutorials are not beside this checkout")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TUTORIALS.glob("*.txt")))
    dotted = re.findall(
        r"\b((?:data|actor_rollout_ref|critic|algorithm|trainer|model)\.[a-z_0-9.]*[a-z0-9])\b(?=[=` ])", text
    )
    dashed = [f for f in re.findall(r"--([a-z][a-z0-9_-]+)", text) if f not in NOT_FLAGS]
    config = text[text.index("GRPOConfig(") : text.index('report_to="none"')]
    arguments = re.findall(r"\b([a-z_0-9]+) ?=", config)
    variables = re.findall(r"\b([A-Z]+(?:_[A-Z]+)+)=", text)
    known = {flag.lstrip("-") for flag in TUTORIAL_FLAGS}
    assert len(dotted) > 60
    assert len(dashed) > 40
    assert len(arguments) > 20
    unlisted = {*dotted, *dashed, *arguments, *variables} - known - NOT_SETTINGS
    assert not unlisted - OF_AN_INSTALLATION


def test_every_setting_that_the_page_names_exists() -> None:
    flags = {*OWN, *(flag for group in GROUPS.values() for flag in group)}
    named = {span for _, here in rows() for span in code_spans(here)}
    settings = {span for span in named if re.fullmatch(r"[a-z]+\.[a-z_.]+", span)}
    assert len(settings) > 50
    assert not [s for s in settings if s not in known_keys() and s.split(".")[0] not in PASS_THROUGH]
    assert not [s for s in named if s.startswith("--") and s.split()[0] not in flags]


def test_every_curve_that_the_page_names_exists() -> None:
    curves = {span for _, here in rows() for span in code_spans(here) if re.fullmatch(r"[a-z]+/[a-z_]+", span)}
    assert len(curves) > 25
    assert not [curve for curve in curves if curve not in CURVES and not curve.startswith("time/")]
    assert not [curve for curve in curves if curve.startswith("time/") and curve.partition("/")[2] not in set(State)]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_the_hint_says(name: str) -> None:
    here = [cell for names, cell in rows() if name in names]
    assert here, f"{name} is not on the page"
    setting = NAMES[name]
    for cell in here:
        spans = code_spans(cell)
        assert cell.strip() == "none" if setting == "" else setting in spans or f"--{setting}" in spans


def test_names_that_stand_beside_as_many_settings_mean_them_in_their_order() -> None:
    for names, here in rows():
        if len(names) == len(spans := code_spans(here)) > 1:
            assert [NAMES.get(name, setting) for name, setting in zip(names, spans, strict=True)] == spans
