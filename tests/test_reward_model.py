"""The reward model: its scores are those of a plain call, whatever shares the batch, and what fails is no number."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import Qwen2ForSequenceClassification

from actors.rewards.model import RewardModel
from actors.rewards.model_worker import SequenceScorer
from actors.rewards.process import RewardFailed
from protocol.errors import ConfigError
from protocol.reward_model import BLOCK_BYTES, NUM_BLOCKS, check_reward_model, reward_model_digest
from protocol.rewards import reward_digest, with_files
from protocol.sections import RewardModelConfig, RewardsConfig
from tests.engines import until
from tests.reward_models import EOS, PAD, make_reward_model, plain_score

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
ANSWERS = ["4", "It is 4.", "2 + 2 is 4, because 1 + 1 + 1 + 1 is 4.", "<pad> <end> and more", "no"]
TOLERANCE = 1e-5
DEADLINE_S = 60.0


def scorer(folder: Path, label: int | None = None, max_tokens: int = 0) -> SequenceScorer:
    return SequenceScorer(str(folder), label, max_tokens, "cpu", "float32", trust_remote_code=False)


def asked(*completions: str) -> list[dict[str, Any]]:
    return [{"messages": QUESTION, "completion": completion} for completion in completions]


# --- What the model says


@pytest.mark.parametrize("pad", [PAD, EOS, None])
@pytest.mark.parametrize("chat", [True, False])
def test_scores_of_a_batch_are_those_of_plain_calls(tmp_path: Path, pad: str | None, chat: bool) -> None:
    folder = make_reward_model(tmp_path, pad=pad, chat=chat)
    expected = [plain_score(folder, QUESTION, answer) for answer in ANSWERS]
    together = scorer(folder).score(asked(*ANSWERS))
    assert together["reasons"] == [""] * len(ANSWERS)
    assert together["values"] == pytest.approx(expected, abs=TOLERANCE)
    assert len({round(value, 3) for value in expected}) == len(ANSWERS), "scores that tell the answers apart"


def test_without_a_padding_token_the_last_one_counts_whichever_it_is(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, pad=None, chat=False)
    answers = ["it is \u00e9", "it is ", "it is !", 'it is "', "it is #", "no"]  # they end in the tokenizer's first ids
    expected = [plain_score(folder, QUESTION, answer) for answer in answers]
    assert scorer(folder).score(asked(*answers))["values"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_model_that_reads_in_both_directions_does_not_read_padding(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, chat=False, encoder=True)
    expected = [plain_score(folder, QUESTION, answer) for answer in ANSWERS]
    assert scorer(folder).score(asked(*ANSWERS))["values"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_score_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    one = scorer(make_reward_model(tmp_path))
    (alone,) = one.score(asked(ANSWERS[0]))["values"]
    for others in (ANSWERS[1:2], ANSWERS[2:], ["x" * 200]):
        assert one.score(asked(*others, ANSWERS[0]))["values"][-1] == pytest.approx(alone, abs=TOLERANCE)


def test_the_output_that_is_the_reward_can_be_named(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, labels=3)
    expected = plain_score(folder, QUESTION, "4", label=2)
    assert scorer(folder, label=2).score(asked("4"))["values"] == pytest.approx([expected], abs=TOLERANCE)


def test_a_conversation_that_is_too_long_is_an_error_of_its_own(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    answered = scorer(folder).score(asked("4", "y" * 600))
    assert answered["values"] == [pytest.approx(plain_score(folder, QUESTION, "4"), abs=TOLERANCE), None]
    assert answered["reasons"][0] == ""
    assert "expected a conversation of 1 to 512 tokens of the reward model, got 6" in answered["reasons"][1]
    assert "set rewards.model.max_tokens" in answered["reasons"][1]
    assert "1 to 9 tokens" in scorer(folder, max_tokens=9).score(asked("4"))["reasons"][0]


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    answered = scorer(make_reward_model(tmp_path, broken=True)).score(asked("4"))
    assert answered == {"values": [None], "reasons": ["expected a finite score, got nan"]}


def test_messages_that_the_template_refuses_are_an_error_of_their_own(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    template = "{{ raise_exception('no system message') if messages[0].role == 'system' else messages[-1].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    answered = scorer(folder).score([*asked("4"), {"messages": QUESTION[1:], "completion": "4"}])
    assert answered["values"][0] is None
    assert answered["values"][1] is not None
    assert "its chat template raised TemplateError: no system message" in answered["reasons"][0]


# --- Folders that cannot be used


def test_a_language_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    Qwen2ForSequenceClassification.from_pretrained(folder).model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"its weights lack score\.weight: is it a language model without a head\?"):
        scorer(folder)


def test_a_folder_is_checked_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.json; fetch one with `hf download NAME --local-dir"):
        check_reward_model(RewardModelConfig(path=str(tmp_path / "nowhere")))
    folder = make_reward_model(tmp_path, labels=3)
    with pytest.raises(ConfigError, match=r"with one output, .* has 3; set rewards\.model\.label to .* 0 to 2"):
        check_reward_model(RewardModelConfig(path=str(folder)))
    with pytest.raises(ConfigError, match=r"expected rewards\.model\.label of 0 to 2 .* got 3"):
        check_reward_model(RewardModelConfig(path=str(folder), label=3))
    check_reward_model(RewardModelConfig(path=str(folder), label=2))
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"as safetensors .* \.bin files are not read, because they are pickles; conv"
    ):
        check_reward_model(RewardModelConfig(path=str(folder), label=2))


def test_models_are_told_apart_by_their_weights_and_not_by_their_place(tmp_path: Path) -> None:
    here, there = make_reward_model(tmp_path / "here"), make_reward_model(tmp_path / "there")
    assert reward_digest(["gsm8k"], str(here)) == reward_digest(["gsm8k"], str(there)) != ""
    large = bytearray(2 * NUM_BLOCKS * BLOCK_BYTES)
    (there / "model.safetensors").write_bytes(large)
    before = reward_model_digest(there)
    large[-1] = 1
    (there / "model.safetensors").write_bytes(large)
    assert len({before, reward_model_digest(there), reward_model_digest(here)}) == 3
    with pytest.raises(ConfigError, match=r"reward model at .*, No such file or directory; set rewards\.model\.path"):
        reward_digest([], str(tmp_path / "nowhere"))


def test_each_host_uses_its_own_folder_with_the_runs_weight() -> None:
    run = RewardsConfig(model=RewardModelConfig(path="/run/rm", weight=0.5))
    assert with_files(run, [], "/my/rm").model == RewardModelConfig(path="/my/rm", weight=0.5)
    assert with_files(run, [], run.model.path) == run


# --- The worker


class Served:
    """A reward model in its worker; everything about it runs in one loop."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._model = RewardModel(RewardModelConfig(path=str(folder), **settings), "cpu", False)
        self._runner.run(self._model.start())

    def outcomes(self, *completions: str, then: int | None = None) -> list[float | BaseException]:
        """Scores or errors. The worker gets the signal `then` after it was asked."""

        async def ask() -> list[float | BaseException]:
            if then is not None:
                asyncio.get_running_loop().call_later(0.1, os.kill, self.pid(), then)
            async with asyncio.timeout(DEADLINE_S):
                asking = [self._model.score(QUESTION, text) for text in completions]
                return await asyncio.gather(*asking, return_exceptions=True)

        return self._runner.run(ask())

    def outcome_of_closing(self, completion: str) -> float | BaseException:
        """Of what its worker has when it is closed."""

        async def ask() -> float | BaseException:
            asking = asyncio.ensure_future(self._model.score(QUESTION, completion))
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.sleep(0)  # it waits now
                await until(lambda: not self._model._waiting, "its worker being asked")
                await self._model.close()
                (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            return outcome

        return self._runner.run(ask())

    @staticmethod
    def pid() -> int:
        (worker,) = [p for p in psutil.Process().children() if "actors.rewards.model_worker" in p.cmdline()]
        return worker.pid

    def close(self) -> None:
        self._runner.run(self._model.close())
        self._runner.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """One worker, and those that take its place: each imports torch and transformers."""
    opened = Served(folder, batch_size=4, timeout_s=3.0)
    yield opened
    opened.close()


def test_completions_that_are_asked_for_together_get_their_own_scores(folder: Path, served: Served) -> None:
    answers = ANSWERS * 2  # more than one batch
    expected = [plain_score(folder, QUESTION, answer) for answer in ANSWERS] * 2
    assert served.outcomes(*answers) == pytest.approx(expected, abs=TOLERANCE)


def test_an_error_of_one_completion_is_not_its_neighbours(folder: Path, served: Served) -> None:
    right, wrong = served.outcomes("4", "y" * 600)
    assert right == pytest.approx(plain_score(folder, QUESTION, "4"), abs=TOLERANCE)
    assert isinstance(wrong, RewardFailed)
    assert str(wrong).startswith("reward_model: expected a conversation of 1 to 512 tokens")


def test_a_worker_that_is_killed_costs_its_batch_and_the_next_one_has_another(folder: Path, served: Served) -> None:
    before = served.pid()
    os.kill(before, signal.SIGSTOP)  # so that the batch is in its hands
    outcomes = served.outcomes("4", "5", then=signal.SIGKILL)
    assert [str(outcome) for outcome in outcomes] == ["reward_model: its worker ended its process (exit code -9)"] * 2
    assert served.outcomes("4") == pytest.approx([plain_score(folder, QUESTION, "4")], abs=TOLERANCE)
    assert served.pid() != before


def test_a_worker_that_hangs_is_killed_at_the_deadline(folder: Path, served: Served) -> None:
    before = served.pid()
    os.kill(before, signal.SIGSTOP)
    first, *rest = served.outcomes("1", "2", "3", "4", "5", "6")
    assert str(first) == "reward_model: no answer within 3 s"
    assert all(isinstance(outcome, RewardFailed) for outcome in rest[:3])
    assert rest[3:] == pytest.approx([plain_score(folder, QUESTION, text) for text in "56"], abs=TOLERANCE)
    assert not psutil.pid_exists(before)


def test_a_model_that_cannot_be_loaded_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    Qwen2ForSequenceClassification.from_pretrained(folder).model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"the reward model in .* cannot be loaded: expected a trained reward model"):
        Served(folder)


def test_who_waits_for_a_score_when_the_generator_leaves_is_told(served: Served) -> None:
    os.kill(served.pid(), signal.SIGSTOP)
    assert str(served.outcome_of_closing("4")) == "reward_model: this generator leaves"
