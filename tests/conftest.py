"""What every test process needs: settings of hypothesis, an environment for deepspeed, and one world of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.load_profile("ci")  # equal examples in every run and everywhere; --hypothesis-profile=default: new ones

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

if TYPE_CHECKING:
    from learner.ranks import Ranks
    from tests.rank_worlds import World


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    import torch

    from learner.ranks import Ranks

    torch.set_num_threads(1)
    opened = Ranks.open({}, "cpu", timeout_s=30)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tests.rank_worlds import world_of_two

    return world_of_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def three_ranks(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> World:
    from tests.rank_worlds import world_of_three

    return world_of_three(tmp_path_factory.mktemp("three"), ranks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--recipe-engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what samples in the runs of tests/test_recipes.py",
    )


@pytest.fixture(scope="session")
def recipe_engine(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--recipe-engine"))
