"""Every algorithm through `launch/cluster.py`, with real processes: settings reach the loop, and the reward rises."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args, get_origin

import pytest

from protocol.algorithm import KlConfig
from protocol.errors import Exit
from tests.algorithm_cases import CASES, NUM_STEPS, Run
from tests.cluster_process import ClusterProcess, steps_of
from tests.easy_task import make_easy_task

RISE = 0.15
"""Of the mean reward, from the first three steps to the last three."""

UNKNOWN_AT_TIMES = {"critic/explained_variance", "policy/kl_reference"}
"""Curves that are null where what they divide by is 0."""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_easy_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(name: str, task: Path) -> Run:
    """One start of all processes, for all tests of this case."""
    with ClusterProcess(task, *CASES[name].flags, "--run-name", name) as cluster:
        assert cluster.end() == Exit.DONE, cluster.said
    return Run(CASES[name].config, steps_of(task / "runs" / name))


def test_every_curve_of_every_step_is_finite(run: Run) -> None:
    assert run.curve("step") == list(range(NUM_STEPS))
    for row in run.steps:
        unknown = {curve for curve, value in row.items() if value is None or not math.isfinite(value)}
        assert unknown <= UNKNOWN_AT_TIMES
        assert {"mismatch/kl", "mismatch/ess", "staleness/mean"} <= row.keys()
        assert row["policy/updates"] == 0 or {"policy/loss", "policy/grad_norm"} <= row.keys()
        assert ("policy/kl_reference" in row) == ("policy/kl_coef" in row) == (run.config.kl.coef > 0)


def test_the_reward_rises(run: Run) -> None:
    rewards = run.curve("reward/mean")
    assert fmean(rewards[-3:]) - fmean(rewards[:3]) > RISE, rewards


def test_a_batch_is_trained_in_as_many_updates_as_the_settings_say(run: Run) -> None:
    algorithm = run.config.algorithm
    updates = run.curve("policy/updates")[run.config.critic.warmup_steps :]
    assert set(updates) == {algorithm.updates_per_batch * algorithm.epochs_per_batch}


def test_the_curves_show_what_is_special_about_the_settings(run: Run, name: str) -> None:
    assert CASES[name].shows(run), run.steps


@pytest.mark.parametrize("section", ["algorithm", "kl", "corrections", "critic", "lora"])
def test_the_runs_take_every_value_of_every_choice_and_move_every_number(section: str) -> None:
    configs = [getattr(case.config, section) for case in CASES.values()]
    missing = set()
    for key, field in type(configs[0]).model_fields.items():
        taken = {getattr(config, key) for config in configs}
        known = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        missing |= {f"{section}.{key} {value}" for value in known if value not in taken}
        missing |= {f"{section}.{key}"} if len(taken) == 1 else set()
    assert not missing


def test_the_runs_take_every_form_of_kl_with_both_gradients_and_in_both_places() -> None:
    kls = [case.config.kl for case in CASES.values() if case.config.kl.coef]
    forms = get_args(KlConfig.model_fields["form"].annotation)
    in_loss = {(kl.form, kl.straight_through) for kl in kls if kl.place == "loss"}
    assert in_loss == set(product(forms, [False, True]))
    assert {kl.place for kl in kls} == {"loss", "reward"}
    assert {kl.place for kl in kls if kl.target} == {"loss", "reward"}
    assert len(kls) < len(CASES), "and there is a run without a reference"
