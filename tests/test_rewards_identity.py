"""Reward code does not travel: two ends that score alike find out by a digest, and each uses its own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.brought_code import is_file
from protocol.errors import ConfigError
from protocol.rewards import reward_digest, with_files
from protocol.sections import RewardConfig, RewardsConfig


def code(folder: Path, name: str, text: str = "def score(completion): return 1.0\n") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:score"


def test_built_in_rewards_need_no_digest() -> None:
    assert reward_digest(["gsm8k", "gsm8k_flexible"]) == ""
    assert not is_file("gsm8k")


def test_equal_code_has_an_equal_digest_wherever_it_lies(tmp_path: Path) -> None:
    here, there = code(tmp_path / "here", "one.py"), code(tmp_path / "there", "other_name.py")
    assert reward_digest([here]) == reward_digest([there]) != ""
    assert reward_digest(["gsm8k", here]) == reward_digest([there])


def test_code_function_and_order_all_count(tmp_path: Path) -> None:
    one, two = code(tmp_path, "one.py"), code(tmp_path, "two.py", "def score(completion): return 2.0\n")
    other_function = one.replace(":score", ":length")
    digests = [[one], [two], [other_function], [one, two], [two, one], [one, one]]
    assert len({reward_digest(uses) for uses in digests}) == len(digests)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected reward code in .*gone\.py, no such file or directory; set rewards"
    ):
        reward_digest([f"{tmp_path / 'gone.py'}:score"])


def test_a_folder_instead_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "code.py").mkdir()
    with pytest.raises(ConfigError, match=r"expected reward code in .*code\.py, is a directory"):
        reward_digest([f"{tmp_path / 'code.py'}:score"])


def test_each_host_uses_its_own_files_in_the_runs_order_with_the_runs_weights() -> None:
    run = RewardsConfig(
        functions=(
            RewardConfig(use="/run/a.py:score", weight=0.5, args={"k": 1}),
            RewardConfig(use="gsm8k", weight=2.0),
            RewardConfig(use="/run/b.py:score", weight=0.25),
        ),
        workers=3,
        timeout_s=7.0,
    )
    ours = with_files(run, ["/my/a.py:score", "/my/b.py:score"])
    assert [function.use for function in ours.functions] == ["/my/a.py:score", "gsm8k", "/my/b.py:score"]
    assert [function.weight for function in ours.functions] == [0.5, 2.0, 0.25]
    assert ours.functions[0].args == {"k": 1}
    assert (ours.workers, ours.timeout_s) == (3, 7.0)


def test_on_the_runs_own_host_nothing_changes() -> None:
    run = RewardsConfig(functions=(RewardConfig(use="gsm8k"), RewardConfig(use="/run/a.py:score")))
    assert with_files(run, [function.use for function in run.functions]) == run


def test_code_of_a_module_counts_by_its_content_and_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    in_file = code(package, "one.py")
    assert reward_digest(["their_rewards.one:score"]) == reward_digest([in_file]) != ""
    with pytest.raises(ConfigError, match=r"in a module their_rewards\.two, Python finds none; install it, or put"):
        reward_digest(["their_rewards.two:score"])


def test_a_module_of_the_run_may_be_a_file_on_another_host() -> None:
    run = RewardsConfig(functions=(RewardConfig(use="pkg.a:score"), RewardConfig(use="gsm8k")))
    assert [function.use for function in with_files(run, ["/my/a.py:score"]).functions] == ["/my/a.py:score", "gsm8k"]
