"""What the demo is made of: word problems with right answers, and a tiny model that everything can load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from actors.rewards.gsm8k import gsm8k
from actors.rollouts.arithmetic import worked_out
from broker.prompts import PromptSource
from broker.tokenizer import ChatTokenizer
from protocol.settings import Value, build, read_recipe
from tools.demo_task import NUM_HELD_OUT, NUM_SHOWN, NUM_TRAIN
from tools.word_problems import (
    GAINS,
    HASTY_AND_RIGHT,
    HIGHEST,
    LARGE_HIGHEST,
    LARGE_LOWEST,
    LEAST_HASTY,
    LOSSES,
    LOWEST,
    MOST_HASTY,
    NAMES,
    Problem,
    demonstrations,
    split,
)

ROOT = Path(__file__).resolve().parents[1]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "demo_task.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    ended = run_tool("--out", str(folder), "--seed", "3")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def problems() -> tuple[list[Problem], list[Problem]]:
    return split(3, NUM_TRAIN, NUM_HELD_OUT)


def story_value(question: str) -> int:
    """The story's end, read off its words."""
    first, story = question.split(", ", 1)
    total = int(re.findall(r"\d+", first)[-1])
    for verb, number in re.findall(r"(\w+) (\d+)", story):
        assert verb in GAINS + LOSSES
        total += int(number) if verb in GAINS else -int(number)
    return total


def test_every_answer_is_what_the_story_comes_to(problems: tuple[list[Problem], list[Problem]]) -> None:
    for problem in problems[0] + problems[1]:
        assert gsm8k(problem.answer, str(story_value(problem.question))) == 1.0
        for before, change, after in re.findall(r"(\d+)([+-]\d+)=(\d+)", problem.answer):
            assert int(before) + int(change) == int(after)
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert min(numbers) >= LOWEST
        assert max(numbers) <= HIGHEST


def test_no_question_is_asked_twice_and_none_is_both_trained_and_held_out(
    problems: tuple[list[Problem], list[Problem]],
) -> None:
    train, held_out = problems
    assert (len(train), len(held_out)) == (NUM_TRAIN, NUM_HELD_OUT)
    assert NUM_HELD_OUT >= 200
    assert len({problem.question for problem in train + held_out}) == NUM_TRAIN + NUM_HELD_OUT


def test_a_seed_gives_the_same_problems_and_another_seed_others(
    problems: tuple[list[Problem], list[Problem]],
) -> None:
    assert split(3, NUM_TRAIN, NUM_HELD_OUT) == problems
    assert split(4, NUM_TRAIN, NUM_HELD_OUT)[1] != problems[1]


def test_most_demonstrations_are_hasty_and_of_those_as_many_are_right_as_said() -> None:
    shown = demonstrations(3, 6000, NUM_HELD_OUT)
    hasty = [problem for problem in shown if "=" not in problem.answer]
    right = {p.question for p in shown if gsm8k(p.answer, str(story_value(p.question))) == 1.0}
    assert len(hasty) > len(shown) / 2
    assert abs(sum(problem.question in right for problem in hasty) / len(hasty) - HASTY_AND_RIGHT) < 0.04
    assert {problem.question for problem in shown if problem not in hasty} <= right
    for name, share in ((NAMES[0], LEAST_HASTY), (NAMES[-1], MOST_HASTY)):
        about = [problem for problem in shown if problem.question.startswith(name)]
        assert abs(sum(problem in hasty for problem in about) / len(about) - share) < 0.1


def test_no_demonstration_answers_a_held_out_question() -> None:
    held_out = {problem.question for problem in split(3, 10, NUM_HELD_OUT)[1]}
    shown = demonstrations(3, 4000, NUM_HELD_OUT)
    assert len(shown) == 4000
    assert not any(problem.question in held_out for problem in shown)


def test_large_problems_are_right_and_their_sums_are_those_that_the_calculator_works_out() -> None:
    train, held_out = split(3, 1000, NUM_HELD_OUT, large=True)
    shown = demonstrations(3, 1000, NUM_HELD_OUT, large=True)
    worked = [problem for problem in shown if "=" in problem.answer]
    assert 100 < len(worked) < 500
    for problem in [*train, *held_out, *worked]:
        assert gsm8k(problem.answer, str(story_value(problem.question))) == 1.0
        sums = re.findall(r"<<([^=]+)=(\d+)>>(\d+)", problem.answer)
        assert len(sums) == problem.answer.count("=")
        for text, result, again in sums:
            assert worked_out(text) == result == again
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert min(numbers) >= LARGE_LOWEST
        assert max(numbers) <= LARGE_HIGHEST
    assert not {problem.question for problem in held_out} & {problem.question for problem in train + shown}


def test_the_tokenizer_gives_single_digits_and_its_own_text_back(
    task: Path, problems: tuple[list[Problem], list[Problem]]
) -> None:
    tokenizer = Tokenizer.from_file(str(task / "model" / "tokenizer.json"))
    assert tokenizer.encode("Tom has 23+4=27.\n#### 27").tokens == [
        *("Tom", "Ġhas", "Ġ", "2", "3", "+", "4", "=", "2", "7", ".Ċ", "####", "Ġ", "2", "7")
    ]
    texts = [text for problem in problems[0][:300] + problems[1] for text in problem] + ["naïve 数\n\n  '!"]
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts


def test_prompts_and_answers_fit_the_recipe(task: Path) -> None:
    recipe = read_recipe(ROOT / "launch" / "recipes" / "demo.yaml")
    made = {"data.train": "train", "data.eval": "test", "warmup.data": "warmup"}
    files = [Value(key, str(task / f"{name}.jsonl"), "this test") for key, name in made.items()]
    config = build(recipe.values, files).config
    source = PromptSource(config, ChatTokenizer(task / "model"))
    pairs = list(source.supervised())
    assert (source.num_rows, len(pairs), len(source.evaluation)) == (NUM_TRAIN, NUM_SHOWN, NUM_HELD_OUT)
    assert max(len(answer) for _, answer in pairs) <= config.sampling.max_tokens


def test_transformers_loads_the_model_whole_and_the_same_tokenizer(
    task: Path, problems: tuple[list[Problem], list[Problem]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(task / "model", output_loading_info=True)
    assert not any(loading.values())
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    theirs, ours = AutoTokenizer.from_pretrained(task / "model"), ChatTokenizer(task / "model")
    assert len(theirs) == model.config.vocab_size
    assert model.generation_config.eos_token_id == theirs.eos_token_id == ours.end_of_sequence
    for problem in problems[1]:
        messages = [{"role": "user", "content": problem.question}]
        tokens = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages).tolist() == list(tokens)
        assert theirs.encode(problem.answer) == ours.encode(problem.answer).tolist()


def test_the_same_seed_writes_the_same_files(task: Path, tmp_path: Path) -> None:
    assert run_tool("--out", str(tmp_path), "--seed", "3").returncode == 0
    names = {str(file.relative_to(task)) for file in task.rglob("*") if file.is_file()}
    assert {"train.jsonl", "test.jsonl", "warmup.jsonl", "model/model.safetensors", "model/tokenizer.json"} <= names
    assert all((task / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_a_model_is_made_for_rows_of_ones_own(tmp_path: Path) -> None:
    rows = [{"question": f"Pourquoi {n} chênes?", "answer": f"Parce que.\n#### {n}"} for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = run_tool("--out", str(tmp_path / "made"), "--data", str(tmp_path / "rows.jsonl"))
    assert ended.returncode == 0, ended.stderr
    tokenizer = ChatTokenizer(tmp_path / "made" / "model")
    text = "Pourquoi 12 chênes?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 6  # its words are known


def test_data_that_cannot_be_read_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    ended = run_tool("--out", str(tmp_path), "--data", str(tmp_path / "none.jsonl"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: expected a data file or folder at")
    assert ended.stderr.count("\n") == 1
