"""Reward functions: what GSM8K's rules accept, and how each shape that people bring is called."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.rewards import registry
from actors.rewards.gsm8k import gsm8k, gsm8k_flexible, reference
from actors.rewards.registry import resolve
from actors.rewards.shapes import opinion_of
from protocol.errors import ConfigError
from protocol.rewards import BUILT_IN, check_rewards

ANSWER = "48/2=24\n48+24=72\n#### 72"


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("#### 72", 1.0),
        ("so it is\n#### 72", 1.0),
        ("#### 72$", 1.0),
        ("#### 7,2", 1.0),  # commas are dropped wherever they stand
        ("#### 71 and then #### 72", 1.0),  # the last one counts
        ("#### 72 and then #### 71", 0.1),
        ("#### 72.", 0.1),  # compared as text
        ("#### 72.0", 0.1),
        ("#### -72", 0.1),
        ("#### ,", 0.1),  # found, though empty without its comma
        ("####72", 0.0),
        ("####  72", 0.0),
        ("#### $72", 0.0),
        ("#### \u221272", 0.0),  # a minus sign that is no hyphen
        ("72", 0.0),
        ("", 0.0),
        ("#### 72" + "." * 292, 0.1),  # dots belong to the number
        ("#### 72" + "x" * 293, 1.0),  # 300 characters, all looked at
        ("#### 72" + "x" * 294, 0.0),  # the first # is out of sight
    ],
)
def test_the_strict_rule_wants_the_number_behind_four_signs(completion: str, score: float) -> None:
    assert gsm8k(completion, ANSWER, format_score=0.1) == score
    assert gsm8k(completion, ANSWER) == (1.0 if score == 1.0 else 0.0)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("it is 72", 1.0),
        ("####72", 1.0),
        ("71, no, 72 dollars", 1.0),
        ("it is 72 ...", 0.1),  # three dots are a number to this rule
        ("it is 72 . ", 1.0),  # one dot is not
        ("it is 72.", 0.1),
        ("it is 7,2", 0.1),
        (".", 0.1),  # found, as nothing better was
        ("no number", 0.0),
        ("72" + "x" * 299, 0.1),  # only the 2 is within 300 characters
    ],
)
def test_the_flexible_rule_takes_the_last_number_of_the_text(completion: str, score: float) -> None:
    assert gsm8k_flexible(completion, ANSWER, format_score=0.1) == score


def test_a_reference_is_the_rows_answer_or_the_number_itself() -> None:
    assert reference(ANSWER) == reference("72") == reference(" 72\n") == "72"
    assert reference("a lot\n#### 1,080") == reference("1,080") == "1080"
    assert reference("#### -7") == "-7"


def test_a_reference_may_be_a_number_of_json() -> None:
    assert [reference(number) for number in (72, 72.0, -7, 0.5, 1080)] == ["72", "72", "-7", "0.5", "1080"]
    assert gsm8k("#### 1,080", 1080) == 1.0


def load(tmp_path: Path, code: str, **arguments: Any) -> Any:
    (tmp_path / "mine.py").write_text(code)
    return resolve(f"{tmp_path / 'mine.py'}:score", 1.0, arguments, 100)


def scores(reward: Any, completions: list[str], columns: dict[str, Any] | None = None) -> Any:
    """The values of completions of one token per character."""
    return [opinion.value for opinion in opinions(reward, completions, columns)]


def opinions(reward: Any, completions: list[str], columns: dict[str, Any] | None = None) -> Any:
    return reward.score(completions, [[ord(c) for c in text] for text in completions], columns or COLUMNS, 5)


COLUMNS = {"answer": "ab", "level": 3, "data_source": "somewhere", "extra_info": {"index": 1}}


VERL = """
def score(data_source, solution_str, ground_truth, extra_info):
    return {"score": len(solution_str) + len(ground_truth), "other": 1}
"""
OBJECT = """
class Score:
    def __call__(self, completion, answer): return len(completion) + len(answer)
score = Score()
"""
CLASS = """
class score:
    def __call__(self, completion, answer): return len(completion) + len(answer)
"""
ORM = """
class ORM:
    def __init__(self, args=None, **kwargs): self.args = args
class score(ORM):
    def __call__(self, completions, answer, **kwargs):
        return [len(c) + len(a) for c, a in zip(completions, answer)]
"""
ASYNC_ORM = ORM.replace("def __call__", "async def __call__")
ASYNC = """
import asyncio
async def score(completion, answer):
    await asyncio.sleep(0)
    return len(completion) + len(answer)
"""


@pytest.mark.parametrize(
    "code",
    [
        "def score(completion, answer): return len(completion) + len(answer)",
        "def score(completion, **columns): return len(completion) + len(columns['answer'])",
        "def score(completions, answer, **rest): return [len(c) + len(a) for c, a in zip(completions, answer)]",
        "def score(completions, **columns): return [len(c) + len(columns['answer'][0]) for c in completions]",
        VERL,
        OBJECT,
        CLASS,
        ORM,
        ASYNC,
        ASYNC_ORM,
        "async def score(completions, answer, **rest): return [len(c) + len(a) for c, a in zip(completions, answer)]",
        VERL.replace("def", "async def"),
    ],
    ids=[
        "ours",
        "ours with all columns",
        "TRL",
        "TRL with all columns",
        "verl",
        "an object",
        "a class",
        "ms-swift",
        "async ours",
        "async ms-swift",
        "async TRL",
        "async verl",
    ],
)
def test_each_shape_is_called_with_what_it_asks_for(tmp_path: Path, code: str) -> None:
    assert scores(load(tmp_path, code), ["x", "xyz"]) == [3.0, 5.0]


def test_verl_code_gets_the_source_and_the_extra_columns(tmp_path: Path) -> None:
    code = (
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return (data_source, ground_truth, extra_info) == ('somewhere', 'truth', {'index': 1})"
    )
    assert scores(load(tmp_path, code), ["x"], COLUMNS | {"ground_truth": "truth"}) == [1.0]


def test_arguments_of_the_settings_reach_the_function(tmp_path: Path) -> None:
    code = "def score(completion, answer, scale=1): return scale * len(completion)"
    assert scores(load(tmp_path, code, scale=5), ["xy"]) == [10.0]
    assert scores(resolve("gsm8k", 1.0, {"format_score": 0.25}, 100), ["#### 1"], {"answer": "2"}) == [0.25]


def test_no_opinion_is_not_zero() -> None:
    assert opinion_of(None).value is opinion_of({"score": None}).value is None
    assert opinion_of({"score": 0}).value == opinion_of(False).value == 0.0


def test_numbers_beside_the_score_are_metrics_and_texts_are_not() -> None:
    said = opinion_of({"score": -1, "acc": True, "pred": "34", "n": 3, "none": None, "odd": float("nan")})
    assert said == (-1.0, {"acc": 1.0, "n": 3.0}, "34")
    assert opinion_of(0.5).metrics == {}
    with pytest.raises(ValueError, match="expected score among the keys of what it returned, got acc, pred"):
        opinion_of({"acc": 1.0, "pred": "34"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", [1.0]])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        opinion_of(value)


def test_a_group_function_owes_one_score_for_each_completion(tmp_path: Path) -> None:
    reward = load(tmp_path, "def score(completions, **columns): return [1.0]")
    with pytest.raises(ValueError, match="2 completions were given, 1 scores came back"):
        scores(reward, ["a", "b"])


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("gms8k", r"expected a reward of gsm8k, .* or package\.module:NAME, got gms8k"),
        ("mine.py", r"expected a reward of gsm8k, .* or package\.module:NAME, got mine\.py"),
        ("none.py:score", "expected reward code in none.py, there is no such file"),
    ],
)
def test_a_name_that_is_nobodys_is_refused(use: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(use, 1.0, {}, 100)


def test_a_function_that_we_cannot_call_is_refused_by_its_parameters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its parameters are \(text, gold\); rename them"):
        load(tmp_path, "def score(text, gold): return 1")
    with pytest.raises(ConfigError, match=r"expected a function score in .*mine\.py, there is none"):
        load(tmp_path, "def other(completion): return 1")


def test_a_reward_in_trls_shape_gets_the_prompts_too(tmp_path: Path) -> None:
    file = tmp_path / "brought.py"
    file.write_text(
        "def echo(prompts, completions, **columns):\n    return [float(p == c) for p, c in zip(prompts, completions)]\n"
    )
    assert scores(resolve(f"{file}:echo", 1.0, {}, 100), ["a", "b"], {"prompt": "a", "answer": "x"}) == [1.0, 0.0]


def test_what_can_be_refused_before_a_run_starts_is_what_there_is() -> None:
    assert sorted(name for names in registry.HOMES.values() for name in names) == sorted(BUILT_IN)
    check_rewards(BUILT_IN)
    for use, words in (
        ("nope", "expected a reward of gsm8k"),
        ("gms8k", r"got gms8k; did you mean gsm8k\? set rewards"),
        ("accuracy", r"got accuracy; did you mean math_accuracy_swift\? set rewards"),
        ("gsm8k:abc", "with :NUMBER as its weight, got gsm8k:abc"),
        ("nobodys.module:f", "got nobodys.module:f"),
        ("nobodys:", "got nobodys:"),
        ("x.py:f", "no such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_rewards([use])


def test_verls_own_scorer_of_one_dataset_is_called_with_what_it_takes(tmp_path: Path) -> None:
    file = tmp_path / "brought.py"
    file.write_text(
        "def compute_score(solution_str, ground_truth, method='a'):\n    return float(solution_str == ground_truth)\n"
    )
    assert scores(resolve(f"{file}:compute_score", 1.0, {}, 100), ["7", "8"], {"answer": "7"}) == [1.0, 0.0]


def test_tokens_reach_whoever_asks_for_them_under_each_librarys_name(tmp_path: Path) -> None:
    for code in (
        "def score(completion, completion_ids, max_tokens): return completion_ids[0] + max_tokens",
        "def score(completions, completion_ids, **rest): return [i[0] + rest['max_tokens'] for i in completion_ids]",
        "def score(completions, response_token_ids, **rest): return [ids[0] + 100 for ids in response_token_ids]",
    ):
        assert scores(load(tmp_path, code), ["A", "B"]) == [165.0, 166.0]


def test_trls_functions_get_messages_where_the_prompt_is_a_chat_and_ms_swifts_get_text(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "abc"}]}
    chat = """
def score(prompts, completions, **kwargs):
    return [len(p[-1]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]
"""
    assert scores(load(tmp_path, chat), ["x", "yz"], row) == [4.0, 5.0]
    assert scores(load(tmp_path, ORM), ["x"], row | {"answer": "ab"}) == [3.0]


def test_an_orm_finds_its_settings_in_args_and_another_class_in_keywords(tmp_path: Path) -> None:
    orm = ORM.replace("len(c)", "self.args.scale * len(c)")
    assert scores(load(tmp_path, orm, scale=10), ["xyz"]) == [32.0]
    other = "class score:\n    def __init__(self, scale): self.scale = scale\n"
    other += "    def __call__(self, completion): return self.scale * len(completion)"
    assert scores(load(tmp_path, other, scale=10), ["xyz"]) == [30.0]


def test_what_an_async_function_keeps_between_calls_stays_usable(tmp_path: Path) -> None:
    code = """
import asyncio
lock = asyncio.Lock()
waiting = None
async def score(completion):
    global waiting
    waiting = waiting or asyncio.get_running_loop().create_future()
    async with lock:
        return float(waiting.get_loop() is asyncio.get_running_loop())
"""
    reward = load(tmp_path, code)
    assert scores(reward, ["a"]) == scores(reward, ["b", "c"])[:1] == [1.0]


def test_a_function_of_a_module_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rewards_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text("loaded = True")
    (package / "brief.py").write_text("from . import loaded\ndef score(completion): return len(completion)")
    monkeypatch.syspath_prepend(tmp_path)
    check_rewards(["rewards_of_ours.brief:score"])
    assert "rewards_of_ours" not in sys.modules  # looked for, not run
    reward = resolve("rewards_of_ours.brief:score", 1.0, {}, 100)
    assert (reward.name, scores(reward, ["abc"])) == ("brief:score", [3.0])
    with pytest.raises(ConfigError, match=r"expected a function other in rewards_of_ours\.brief, there is none"):
        resolve("rewards_of_ours.brief:other", 1.0, {}, 100)
    with pytest.raises(ConfigError, match=r"importing rewards_of_ours.gone raised ModuleNotFoundError: .*; install it"):
        resolve("rewards_of_ours.gone:score", 1.0, {}, 100)


LOGGING = """
def score(completions, trainer_state, log_metric, log_extra):
    log_metric("seen", len(completions))
    log_metric("seen", 4)
    log_metric("odd", float("nan"))
    log_extra("size", [len(c) for c in completions])
    log_extra("text", completions)
    return [trainer_state.global_step] * len(completions)
"""
IN_KEYWORDS = """
def score(completions, **kwargs):
    kwargs["log_metric"]("seen", 1)
    return [kwargs["trainer_state"].global_step] * len(completions)
"""


def test_a_function_of_trl_logs_numbers_and_knows_the_version(tmp_path: Path) -> None:
    seen = opinions(load(tmp_path, LOGGING), ["a", "abc"])
    assert [opinion.value for opinion in seen] == [5.0, 5.0]
    assert [opinion.metrics for opinion in seen] == [{"seen": 3.0, "size": 1.0}, {"seen": 3.0, "size": 3.0}]


def test_a_function_of_trl_finds_them_among_its_keywords_too(tmp_path: Path) -> None:
    (seen,) = opinions(load(tmp_path, IN_KEYWORDS), ["a"])
    assert (seen.value, seen.metrics) == (5.0, {"seen": 1.0})


def test_what_no_trainer_state_can_know_when_scoring_is_an_error(tmp_path: Path) -> None:
    code = "def score(completions, trainer_state): return [trainer_state.max_steps]"
    with pytest.raises(
        AttributeError, match=r"expected trainer_state\.global_step, all that is known .*, got \.max_st"
    ):
        scores(load(tmp_path, code), ["a"])
    code = "def score(completions, log_extra): log_extra('x', [1, 2]); return [0]"
    with pytest.raises(ValueError, match=r"expected one value for each of 1 completions in log_extra\('x'\), got 2"):
        scores(load(tmp_path, code), ["a"])


def test_the_page_has_a_row_for_every_built_in_function_and_for_no_other() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == BUILT_IN


@pytest.mark.parametrize("use", BUILT_IN)
def test_every_built_in_function_can_be_called_with_what_a_worker_has(use: str) -> None:
    arguments = {"buffer_tokens": 20} if use.startswith("soft_overlong") else {}
    values = scores(resolve(use, 1.0, arguments, 100), ["#### 2", "<answer>2</answer>"], {"answer": "#### 2"})
    assert [type(value) for value in values] == [float, float]


def test_arguments_of_a_built_in_function_are_checked_before_it_is_called() -> None:
    with pytest.raises(ConfigError, match="expected soft_overlong to have args of buffer_tokens, buffer_tokens is mis"):
        resolve("soft_overlong", 1.0, {}, 100)
    with pytest.raises(ConfigError, match="expected gsm8k to have args of format_score, got fromat_score; set args"):
        resolve("gsm8k", 1.0, {"fromat_score": 0.1}, 100)
    with pytest.raises(ConfigError, match="expected length to have args of characters, got max_tokens; set args"):
        resolve("length", 1.0, {"max_tokens": 50}, 100)
    resolve("cosine", 1.0, {"max_tokens": 50}, 100)


@pytest.mark.parametrize(
    ("use", "completion", "found"),
    [
        ("gsm8k", "#### 1,200 or rather #### 1,300", "1300"),
        ("gsm8k", "it is 1300", None),
        ("gsm8k_flexible", "it is 1300 .", "1300"),
        ("gsm8k_flexible", "no idea", None),
        ("math_accuracy", r"so \boxed{\frac{1}{2}}", "1/2"),
        ("math_accuracy", r"so \boxed{\dfrac{1}{2}}", "1/2"),
        ("math_accuracy", "so 7", None),
        ("math_accuracy_reasoning", r"\boxed{3}</think> \boxed{4}", "4"),
        ("math_accuracy_reasoning", r"\boxed{3}", None),
        ("math_accuracy_swift", r"\boxed{3} <answer>4</answer>", "4"),
        ("math_accuracy_swift", r"\boxed{3}", "3"),
        ("math_dapo", "Answer: 12 dollars", "12"),
        ("math_dapo", "it is 12", None),
        ("xml_correctness", "<answer>\n12\n</answer>", "12"),
        ("xml_correctness", "12", None),
        ("think_format", "<think>12</think>", None),
    ],
)
def test_a_majority_votes_on_what_the_function_compares(use: str, completion: str, found: str | None) -> None:
    reward = resolve(use, 1.0, {}, 100)
    answer = reward.final_answer(completion, opinion_of(0.0))
    assert answer == found
    if answer is not None:
        (opinion,) = reward.score([completion], [[1]], {"answer": answer}, 0)
        assert opinion.value is not None
        assert opinion.value >= 1.0, "as the reference, it is right"


def test_an_argument_that_changes_what_is_compared_changes_the_vote() -> None:
    boxed = resolve("math_dapo", 1.0, {"strict_box": True}, 100)
    assert boxed.final_answer(r"Answer: 3, \boxed{4}", opinion_of(0.0)) == "4"
