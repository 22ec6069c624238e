"""What every test process needs before deepspeed is imported, and the one world of one rank that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

if TYPE_CHECKING:
    from learner.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    import torch

    from learner.ranks import Ranks

    torch.set_num_threads(1)
    opened = Ranks.open({}, "cpu", timeout_s=30)
    yield opened
    opened.close()
