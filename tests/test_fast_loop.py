"""The whole loop at hundreds of steps a minute: broker, sockets, supervisor, learner, snapshots and checkpoints are
real, only the tokens come from a hash.

All tests read what one run has left behind.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from actors.fake_engine import fake_key, fake_token
from actors.rollout import sampling_seed
from learner import checkpoint
from learner.policy import Policy
from learner.ranks import Ranks
from protocol import settings
from protocol.checkpoints import damage
from protocol.errors import Exit
from tests.cluster_process import ClusterProcess, fast_flags, ledger_of, make_task, samples_of, steps_of

NUM_STEPS = 200
PROMPTS, GROUP, BOUND = 4, 4, 2
STEPS_PER_MINUTE = 200  # on two cores that others use too; alone they make more than a thousand
KEPT = 3
MEAN_TOKENS = 20.0  # of the fake engine's completions

pytestmark = pytest.mark.timeout(240)


class Ran(NamedTuple):
    """The run, over."""

    run_dir: Path
    said: str
    code: int
    tree: list[psutil.Process]  # all that ran below the command, to the reward workers
    survivors: list[psutil.Process]  # of it, when the command had ended


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    task = make_task(tmp_path_factory.mktemp("fast"))
    run_dir = task / "runs" / "fast"
    wanted: dict[str, str | int] = {"run-name": "fast", "steps": NUM_STEPS, "generators": 2, "checkpoint.keep": KEPT}
    with ClusterProcess(task, *fast_flags(**wanted)) as process:
        process.until_step(run_dir, NUM_STEPS // 2)
        tree = process.tree()
        code = process.end()
        return Ran(run_dir, process.said, code, tree, [child for child in tree if child.is_running()])


def test_it_makes_hundreds_of_steps_a_minute(ran: Ran) -> None:
    rows = steps_of(ran.run_dir)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    minutes = (rows[-1]["time"] - rows[0]["time"]) / 60.0
    assert (NUM_STEPS - 1) / minutes >= STEPS_PER_MINUTE


def test_it_ends_well_and_leaves_no_process(ran: Ran) -> None:
    assert ran.code == Exit.DONE, ran.said
    assert len(ran.tree) >= 6, "broker, learner, two generators and their reward workers"
    assert not ran.survivors


def test_the_ledger_adds_up_at_every_step_and_what_is_open_keeps_its_bound(ran: Ran) -> None:
    for row in steps_of(ran.run_dir):
        ledger = ledger_of(row)
        offered = ledger.pop("offered")
        assert offered == sum(ledger.values())
        assert ledger["trained"] == PROMPTS * (row["step"] + 1)
        assert offered - ledger["trained"] <= BOUND * PROMPTS
    assert offered == ledger["trained"] == PROMPTS * NUM_STEPS


def test_every_sample_of_every_prompt_is_trained_once(ran: Ran) -> None:
    trained = Counter((sample["prompt_number"], sample["sample"]) for sample in samples_of(ran.run_dir))
    assert trained == Counter((prompt, sample) for prompt in range(NUM_STEPS * PROMPTS) for sample in range(GROUP))


def test_no_token_is_staler_than_the_bound_which_is_reached(ran: Ran) -> None:
    rows, samples = steps_of(ran.run_dir), samples_of(ran.run_dir)
    for row in rows:
        versions = {span[0] for sample in samples if sample["step"] == row["step"] for span in sample["versions"]}
        assert max(versions) <= row["step"]
        assert row["staleness/max"] == row["step"] - min(versions) <= BOUND
    assert max(row["staleness/max"] for row in rows) == BOUND


def test_every_token_was_drawn_by_the_version_that_is_recorded_of_it(ran: Ran) -> None:
    config = settings.load(ran.run_dir / "config.yaml")
    vocabulary = Tokenizer.from_file(str(Path(config.model.path) / "tokenizer.json")).get_vocab()

    def ids(text: str) -> list[int]:
        return [vocabulary[word] for word in text.split()]

    for sample in samples_of(ran.run_dir):
        seed = sampling_seed(config.run.seed, sample["prompt_number"], sample["sample"], failures=0)
        key = fake_key(np.array(ids(sample["prompt"]), np.int32), seed, config.sampling.params())
        versions = [version for version, start, end in sample["versions"] for _ in range(start, end)]
        drawn = [fake_token(key, v, place, len(vocabulary), MEAN_TOKENS) for place, v in enumerate(versions)]
        assert [draw.token for draw in drawn] == ids(sample["completion"])


def test_its_checkpoints_verify_and_the_last_one_loads(ran: Ran, ranks: Ranks) -> None:
    folder = ran.run_dir / "checkpoints"
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())
    assert steps == [NUM_STEPS - 10, NUM_STEPS - 5, NUM_STEPS]
    assert [damage(folder / f"step_{step}") for step in steps] == [""] * KEPT
    config = settings.load(ran.run_dir / "config.yaml")
    policy = Policy.open(config, config.model.path, ranks)
    extras = checkpoint.load(folder / f"step_{NUM_STEPS}", policy)
    assert extras["version"] == policy.num_applied == NUM_STEPS
