"""The prompt stream, and the tokenizer that has to agree with the one of `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.prompts import LOOKED_AT, MAX_COLUMNS_CHARACTERS, PromptSource, Unusable
from broker.tokenizer import ChatTokenizer
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.types import Prompt
from tools.tiny_model import Shape, train_tokenizer, write_model

ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}", "level": n} for n in range(10)]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 + 1?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Name 2 apples\n"}],
    [
        {"role": "user", "content": "What is 12 – 4?"},
        {"role": "assistant", "content": "It's 8."},
        {"role": "user", "content": "<|end|> naïve 数"},
    ],
]
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "{{ loop.index0 }}|{{ message | tojson }}|{{ message.content | trim }}\n{% endfor %}{{ eos_token }}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the demo has it."""
    folder = tmp_path_factory.mktemp("model")
    texts = [text for row in ROWS for text in (str(row["question"]), str(row["answer"]))]
    write_model(folder, train_tokenizer(texts, 1000), Shape(hidden=32, heads=2, intermediate=32), seed=0)
    return folder


def config_for(folder: Path, data: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """Settings over a folder with training and held-out rows."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", ROWS[:7]), ("test", ROWS[7:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Config.model_validate({"data": {"train": str(folder)} | (data or {})} | sections)


def rows_of(source: PromptSource, numbers: range) -> list[int]:
    prompts = [source.prompt(number) for number in numbers]
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return [prompt.row for prompt in prompts if isinstance(prompt, Prompt)]


@pytest.mark.parametrize("template", [None, MARKED_TEMPLATE], ids=["the demo's template", "a template with everything"])
def test_conversations_are_tokenised_as_transformers_does_it(model: Path, tmp_path: Path, template: str | None) -> None:
    from transformers import AutoTokenizer

    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|user|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = ChatTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.render(messages) == text
        tokens = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages).tolist() == list(tokens)
        assert ours.encode(text).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.end_of_sequence == theirs.eos_token_id


def test_a_template_that_refuses_a_conversation_is_the_users_error(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ConfigError, match=r"refuses the messages of a row: roles must alternate; the last of them is \{'role'"
    ):
        ChatTokenizer(tmp_path).render(CONVERSATIONS[0])


def test_a_row_that_the_template_fails_on_is_left_out_and_named_where_it_comes_late(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that comes first ends the start, of each source."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content + '!' }}")
    tokenizer = ChatTokenizer(tmp_path)
    chats = [[{"role": "user", "content": "What is 3 + 1?"}]] * LOOKED_AT + [[{"role": "user", "content": ["parts"]}]]
    for name, found in (("late", chats), ("first", chats[-1:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": c, "answer": "1"}) for c in found))

    def opened(*names: str) -> PromptSource:
        train = ",".join(f"{tmp_path}/{name}.jsonl" for name in names)
        data = {"train": train, "shuffle": False}
        return PromptSource(Config.model_validate({"data": data, "evaluation": {"every": 0}}), tokenizer)

    source = opened("late")
    assert isinstance(source.prompt(LOOKED_AT - 1), Prompt)
    assert source.prompt(LOOKED_AT) == Unusable(LOOKED_AT, "refused_by_chat_template")
    assert f"row {LOOKED_AT} is left out: the chat template of" in caplog.text
    assert "TypeError" in caplog.text
    with pytest.raises(ConfigError, match=r"refuses the messages of a row: TypeError: .*\['parts'\]"):
        opened("late", "first")


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a fast tokenizer .*save_pretrained\(FOLDER\), or set model.path"):
        ChatTokenizer(tmp_path)


def test_chat_rows_need_a_chat_template(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(ConfigError, match=r"the rows are chat messages, but .* has no chat template; use an instruct"):
        ChatTokenizer(tmp_path).encode_chat(CONVERSATIONS[0])


def test_each_pass_offers_every_row_once_in_an_order_of_its_own(model: Path, tmp_path: Path) -> None:
    source = PromptSource(config_for(tmp_path), ChatTokenizer(model))
    passes = [rows_of(source, range(start, start + 7)) for start in (0, 7, 14)]
    assert all(sorted(rows) == list(range(7)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_position_depends_on_seed_and_number_alone(model: Path, tmp_path: Path) -> None:
    def order(seed: int) -> PromptSource:
        return PromptSource(config_for(tmp_path, run={"seed": seed}), ChatTokenizer(model))

    forwards, backwards = order(3), order(3)
    resumed = [backwards.prompt(number) for number in reversed(range(20))][::-1]
    assert rows_of(forwards, range(20)) == [prompt.row for prompt in resumed if isinstance(prompt, Prompt)]
    assert rows_of(order(4), range(20)) != rows_of(forwards, range(20))


def test_without_shuffling_rows_come_in_their_order(model: Path, tmp_path: Path) -> None:
    source = PromptSource(config_for(tmp_path, {"shuffle": False, "max_rows": 5}), ChatTokenizer(model))
    assert rows_of(source, range(12)) == [*range(5), *range(5), 0, 1]


def test_a_prompt_is_the_question_in_the_models_template_with_system_and_suffix(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    data = {"system": str(file), "suffix": " Think.", "shuffle": False}
    tokenizer = ChatTokenizer(model)
    prompt = PromptSource(config_for(tmp_path / "data", data), tokenizer).prompt(4)
    assert isinstance(prompt, Prompt)
    text = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
    assert text == "<|system|>Be brief.<|user|>What is 4 + 1? Think.<|assistant|>"
    assert prompt.columns == {**ROWS[4], "prompt": ROWS[4]["question"], "level": 4}
    assert (prompt.number, prompt.row) == (4, 4)


def test_the_conversation_travels_where_a_reward_model_reads_it(model: Path, tmp_path: Path) -> None:
    data = {"system": "Be brief.", "suffix": " Think.", "shuffle": False}
    prompt = PromptSource(config_for(tmp_path, data), ChatTokenizer(model)).prompt(2)
    assert isinstance(prompt, Prompt)
    assert list(prompt.conversation) == []
    judged = PromptSource(config_for(tmp_path, data, rewards={"model": {"path": "judge"}}), ChatTokenizer(model))
    prompt = judged.prompt(2)
    assert isinstance(prompt, Prompt)
    assert list(prompt.conversation) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 1? Think."},
    ]
    assert judged.evaluation[0].conversation


def test_a_system_message_too_long_for_a_files_name_is_a_text(model: Path, tmp_path: Path) -> None:
    tokenizer, text = ChatTokenizer(model), "Be brief. " * 70
    settings = {"system": text, "max_prompt_tokens": 2000}
    prompt = PromptSource(config_for(tmp_path, settings), tokenizer).prompt(0)
    assert isinstance(prompt, Prompt)
    assert tokenizer.decode(prompt.tokens).startswith("Be brief. Be brief.")


def test_without_a_chat_template_a_prompt_is_plain_text(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    tokenizer = ChatTokenizer(tmp_path)
    prompt = PromptSource(config_for(tmp_path / "data", {"shuffle": False, "suffix": "!"}), tokenizer).prompt(0)
    assert isinstance(prompt, Prompt)
    assert tokenizer.decode(prompt.tokens, skip_special_tokens=False) == "What is 0 + 1?!"


def test_a_prompt_that_is_too_long_is_said_to_be(model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, {"max_prompt_tokens": 20, "shuffle": False})
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n" + json.dumps({"question": "1 " * 40, "answer": "#### 1"}))
    source = PromptSource(config, ChatTokenizer(model))
    assert source.prompt(7) == Unusable(7, "prompt_too_long")
    assert isinstance(source.prompt(6), Prompt)


def test_a_row_that_is_too_large_for_a_lease_is_said_to_be(model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, {"shuffle": False})
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n" + json.dumps({"question": "1", "answer": "#### 1", "notes": "x" * MAX_COLUMNS_CHARACTERS}))
    source = PromptSource(config, ChatTokenizer(model))
    assert source.prompt(7) == Unusable(7, "row_too_large")


def test_data_of_which_nothing_fits_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the first 7 prompts have 1\d to 1\d tokens, data.max_prompt_tokens is 4"):
        PromptSource(config_for(tmp_path, {"max_prompt_tokens": 4}), ChatTokenizer(model))


def test_held_out_prompts_keep_their_order_and_their_own_numbers(model: Path, tmp_path: Path) -> None:
    source = PromptSource(config_for(tmp_path, evaluation={"max_prompts": 2}), ChatTokenizer(model))
    assert [(prompt.number, prompt.row, prompt.columns["level"]) for prompt in source.evaluation] == [
        (0, 0, 7),
        (1, 1, 8),
    ]


def test_what_is_read_is_said_with_held_out_prompts_that_are_too_long(model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, {"train": f"{tmp_path}#3", "max_prompt_tokens": 20})
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write("\n" + json.dumps({"question": "1 " * 40, "answer": "#### 1"}))
    columns = "prompt <- question, answer <- answer (GSM8K's columns)"
    source = PromptSource(config, ChatTokenizer(model))
    assert source.notes == [
        f"training: 3 of 7 rows from {tmp_path}: {columns}",
        f"held out: 4 rows from {tmp_path}: {columns}",
        "held out: 3 prompts; 1 longer than 20 tokens or too large, and left out",
    ]
    assert source.num_rows == 3
    fewer = config_for(tmp_path, {"max_rows": 2}, evaluation={"every": 0}, warmup={"data": str(tmp_path)})
    source = PromptSource(fewer, ChatTokenizer(model))
    assert len(list(source.supervised())) == 7
    assert source.notes == [
        f"training: 7 rows from {tmp_path}: {columns}",
        "training: the first 2 of them, as data.max_rows says",
        f"warm start: 7 rows from {tmp_path}: {columns}",
        "warm start: imitates answer",
    ]


def test_held_out_rows_that_are_drawn_are_the_same_for_every_seed(model: Path, tmp_path: Path) -> None:
    def drawn(seed: int) -> tuple[list[int], list[int]]:
        data = {"train": f"{tmp_path}#4", "eval": f"{tmp_path / 'train.jsonl'}#3", "shuffle": False}
        source = PromptSource(config_for(tmp_path, data, run={"seed": seed}), ChatTokenizer(model))
        training = [prompt for prompt in map(source.prompt, range(4)) if isinstance(prompt, Prompt)]
        return [p.columns["level"] for p in training], [p.columns["level"] for p in source.evaluation]

    training, held_out = zip(*map(drawn, range(8)), strict=True)
    assert len(set(map(tuple, held_out))) == 1
    assert len(set(map(tuple, training))) > 1


def test_a_held_out_source_without_rows_is_told_beside_one_that_has_some(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    config = config_for(tmp_path / "rows", {"eval": f"{tmp_path / 'rows'},{empty}"})
    with pytest.raises(ConfigError, match=f"rows in every source of data.eval, got none from {empty} .*set data.eval"):
        PromptSource(config, ChatTokenizer(model))


def test_a_system_message_that_names_a_file_which_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "prompt.txt")
    with pytest.raises(ConfigError, match=f"expected a text file at {missing}, there is none; set data.system"):
        PromptSource(config_for(tmp_path, {"system": missing}), ChatTokenizer(model))


def test_a_file_of_training_rows_is_not_its_own_held_out_set(model: Path, tmp_path: Path) -> None:
    config_for(tmp_path)
    train = str(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"train.jsonl has no test split.*set data.eval, or --evaluation.every 0"):
        PromptSource(Config.model_validate({"data": {"train": train}}), ChatTokenizer(model))
    without = Config.model_validate({"data": {"train": train}, "evaluation": {"every": 0}})
    assert PromptSource(without, ChatTokenizer(model)).evaluation == []
    given = Config.model_validate({"data": {"train": train, "eval": str(tmp_path / "test.jsonl")}})
    assert [prompt.columns["level"] for prompt in PromptSource(given, ChatTokenizer(model)).evaluation] == [7, 8, 9]


def test_the_warm_start_gets_every_answer_ended(model: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(model)
    pairs = list(PromptSource(config_for(tmp_path), tokenizer).supervised())
    assert len(pairs) == 7
    assert tokenizer.decode(pairs[2][0], skip_special_tokens=False) == "<|user|>What is 2 + 1?<|assistant|>"
    assert tokenizer.decode(pairs[2][1], skip_special_tokens=False) == "2+1=3\n#### 3<|end|>"


def test_making_prompts_does_not_import_torch(model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path).model_dump_json()
    code = (
        "import sys; from pathlib import Path; from protocol.config import Config\n"
        "from broker.prompts import PromptSource; from broker.tokenizer import ChatTokenizer\n"
        "source = PromptSource(Config.model_validate_json(sys.argv[1]), ChatTokenizer(Path(sys.argv[2])))\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(source.prompt(3).number, sorted(heavy))"
    )
    command = [sys.executable, "-c", code, config, str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.strip() == "3 []", ended.stderr


def test_held_out_prompts_are_spread_over_their_sources_and_the_note_says_how_many_of_each(
    model: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps(row | {"data_source": "lab/sums"}) for row in ROWS))
    config = config_for(tmp_path / "rows", evaluation={"max_prompts": 5})
    sources = f"{tmp_path / 'rows'},{more}"
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": sources})})
    source = PromptSource(config, ChatTokenizer(model))
    assert source.evaluation_sources == ["rows", "lab/sums", "rows", "lab/sums", "rows"]
    assert [prompt.number for prompt in source.evaluation] == list(range(5))
    assert [prompt.columns["level"] for prompt in source.evaluation] == [7, 0, 8, 1, 9]
    assert source.notes[-1] == "held out: 5 prompts (3 of rows, 2 of lab/sums)"


def test_an_evaluation_by_itself_reads_no_training_rows_and_needs_held_out_ones(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS[:3])))
    only = {"run": {"evaluation_only": True}, "evaluation": {"every": 0}}
    config = Config.model_validate({"data": {"train": str(tmp_path / "nowhere.jsonl"), "eval": str(rows)}} | only)
    source = PromptSource(config, ChatTokenizer(model))
    assert (source.num_rows, len(source.evaluation), config.steps_for(100)) == (0, 3, 0)
    config = Config.model_validate({"data": {"train": str(rows)}} | only)
    with pytest.raises(ConfigError, match=r"evaluation_only is set, but there are no held-out rows .* set data\.eval$"):
        PromptSource(config, ChatTokenizer(model))
