"""The supervised warm start: it learns answers, by rows that depend on seed and step alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.ranks import Ranks
from learner.warmup import WarmupStep, batch_of_step, warm_up
from protocol.errors import Exit
from tests.learning import examples, model_folder, open_policy, train_step, warmup_settings, weights
from tests.rows import random_rows
from tools.sft import main
from tools.tiny_model import Shape, train_tokenizer, write_model
from tools.word_problems import split

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_the_loss_is_that_of_the_answer_tokens_alone_at_temperature_1(model: str, ranks: Ranks) -> None:
    steps: list[WarmupStep] = []
    policy = open_policy(model, ranks, temperature=0.5)
    warm_up(policy, examples(), warmup_settings(steps=1), 3, 16, ranks, steps.append)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for index in batch_of_step(12, 5, 0, 3):
        prompt, answer = (torch.from_numpy(tokens).long() for tokens in examples()[index])
        logits = lm(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    assert steps[0].loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_the_loss_falls_and_so_does_the_learning_rate(model: str, ranks: Ranks) -> None:
    steps: list[WarmupStep] = []
    warm_up(open_policy(model, ranks), examples(), warmup_settings(steps=40), 0, 64, ranks, steps.append)
    assert [step.step for step in steps] == list(range(40))
    assert steps[-1].loss < 0.5 * steps[0].loss
    rates = [step.learning_rate for step in steps]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-3
    assert rates[-1] == pytest.approx(1e-3 / 40)
    assert all(step.applied for step in steps)


def test_the_optimizer_starts_anew_after_it(model: str, ranks: Ranks) -> None:
    policy = open_policy(model, ranks)
    warm_up(policy, examples(), warmup_settings(steps=2), 0, 64, ranks, lambda step: None)
    assert policy.num_applied == 0
    train_step(policy, ranks, random_rows(1, 4))
    assert policy.num_applied == 1


def test_no_steps_change_nothing(model: str, ranks: Ranks) -> None:
    policy = open_policy(model, ranks)
    before = weights(policy)
    warm_up(policy, examples(), warmup_settings(steps=0), 0, 64, ranks, lambda step: None)
    assert all(torch.equal(before[name], value) for name, value in weights(policy).items())


def test_every_pass_has_each_row_once_in_its_own_order() -> None:
    rows = [row for step in range(7) for row in batch_of_step(7, 3, step, seed=5)]
    passes = [rows[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert rows[:3] == batch_of_step(7, 3, 0, seed=5) != batch_of_step(7, 3, 0, seed=6)


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert sorted(batch_of_step(3, 6, 0, seed=1)) == [0, 0, 1, 1, 2, 2]


def run_sft(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "LOCAL_RANK", "PYTHONPATH")
    }
    command = [sys.executable, str(ROOT / "tools" / "sft.py"), *arguments]
    return subprocess.run(
        command,
        env=environ | {"OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_the_sft_tool_writes_a_model_that_answers(tmp_path: Path) -> None:
    problems = split(0, 8, 0)[0]
    tokenizer = train_tokenizer([text for problem in problems for text in problem], 400)
    write_model(tmp_path / "in", tokenizer, Shape(hidden=64), seed=0)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in problems))
    flags = ["--steps", "120", "--batch", "8", "--lr", "5e-3", "--device", "cpu"]
    result = run_sft("--model", str(tmp_path / "in"), "--data", str(data), "--out", str(tmp_path / "out"), *flags)
    assert result.returncode == 0, result.stderr
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    for problem in problems:
        chat = [{"role": "user", "content": problem.question}]
        ids = reader.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        answer = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        assert reader.decode(answer[0, ids.shape[1] :]) == problem.answer + "<|end|>"


def test_the_sft_tool_writes_over_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out"
    file.touch()
    assert main(["--model", "m", "--data", "d", "--out", str(file)]) == Exit.SETTINGS
    assert capsys.readouterr().err == f"sft: {file} is no empty folder; set --out to a new one\n"


def test_the_sft_tool_says_what_is_wrong_with_a_row(model: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "w1", "answer": "w2"}\n{"question": "w1"}\n')
    result = run_sft("--model", model, "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert result.returncode == 2
    assert f"row 1 of {data} has only the columns question; add it" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("sft: the rows could not be read; the words of tools/examples.py")
    assert "Traceback" not in result.stderr
