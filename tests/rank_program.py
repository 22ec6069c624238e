"""One of several learner ranks over gloo: trains at every ZeRO stage and writes down what it saw.

`run_ranks` starts as many as asked for; each process runs `main`. What is written is compared with one rank by the
tests.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(folder: Path, num_ranks: int, timeout_s: float = 100.0) -> list[dict[str, Any]]:
    """Run `main` in `num_ranks` processes on `folder`; what each rank saw, by rank."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with open(folder / f"rank{rank}.log", "wb") as log:
            command = [sys.executable, "-m", "tests.rank_program", str(folder)]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | place | meeting, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(num_ranks))
    assert codes == [0] * num_ranks, logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from learner.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.open(os.environ, "cpu", timeout_s=60)
    seen: dict[str, Any] = collectives(ranks)
    for zero in range(4):
        seen[f"zero{zero}"] = training(folder, ranks, zero)
    seen["restored"] = restoring(folder, ranks)
    seen["supervised"] = supervised(folder, ranks)
    seen["alone"] = waiting_for_a_rank_that_does_not_come(ranks)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


def collectives(ranks: Any) -> dict[str, Any]:
    last = ranks.num_ranks - 1
    huge = (1 << 127) + 5
    return {
        "equal": ranks.same_everywhere((huge, -1, 7)),
        "unequal": ranks.same_everywhere((huge, -1, 7 + (ranks.rank == last))),
        "sum": ranks.sum_across({"b": ranks.rank, "a": 0.5}),
        "max": ranks.max_across({"b": ranks.rank, "a": -1.0}),
        "any": [ranks.any_true(ranks.rank == last), ranks.any_true(False)],
        "first": ranks.first_rank_says(1000 + ranks.rank),
    }


def training(folder: Path, ranks: Any, zero: int) -> dict[str, Any]:
    import torch

    from learner.batches import pack
    from learner.checkpoint import save
    from learner.publisher import Publisher
    from tests.learning import RATE, open_policy, sampled_steps, train_step, whole_state
    from tests.rows import random_rows

    model = str(folder / ("tied" if zero % 2 else "untied"))
    policy = open_policy(model, ranks, zero)
    updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in sampled_steps(model)]
    save(folder / f"checkpoints{zero}", len(updates), policy, {"who": ranks.rank}, 1, ranks)

    publisher = Publisher(folder / f"snapshots{zero}", policy, ranks)
    publisher.copy(4)
    if ranks.is_first:
        publisher.finish()

    before, last = whole_state(policy), ranks.rank == ranks.num_ranks - 1
    rows = random_rows(5, 7)[ranks.rank :: ranks.num_ranks]
    factor = torch.inf if last else 0.01
    skipped = policy.update(pack(rows, 64), lambda logprobs, *_: (logprobs.sum() * 0.01 + (factor - 0.01), {}), RATE)
    after = whole_state(policy)
    return {
        "norms": [update.grad_norm for update in updates],
        "losses": [update.sums["loss"] for update in updates],
        "tokens": [update.sums["tokens"] for update in updates],
        "micro_batches": [update.num_micro_batches for update in updates],
        "skipped": not skipped.applied,
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
    }


def restoring(folder: Path, ranks: Any) -> dict[str, Any]:
    """Go on from the one-rank checkpoint that the test wrote, at stage 3: slices of unlike lengths."""
    from safetensors.torch import save_file

    from learner.checkpoint import load
    from tests.learning import RATE, open_policy, sampled_steps, train_step, whole_state

    policy = open_policy(str(folder / "tied"), ranks, 3)
    extras = load(folder / "one_rank" / "step_2", policy)
    state = whole_state(policy)
    update = train_step(policy, ranks, sampled_steps(str(folder / "tied"))[2], learning_rate=RATE)
    if ranks.is_first:
        save_file(state, folder / "restored.safetensors")
    return {
        "extras": {name: list(value) for name, value in extras.items()},
        "norm": update.grad_norm,
        "applied": policy.num_applied,
    }


def supervised(folder: Path, ranks: Any) -> list[float]:
    from learner.warmup import warm_up
    from tests.learning import examples, open_policy
    from tests.learning import warmup_settings as settings

    losses: list[float] = []
    policy = open_policy(str(folder / "tied"), ranks, 1)
    warm_up(policy, examples(), settings(steps=4), 3, 64, ranks, lambda step: losses.append(step.loss))
    return losses


def waiting_for_a_rank_that_does_not_come(ranks: Any) -> str:
    from protocol.errors import PeerTimeout

    if not ranks.is_first:
        return ""
    try:
        ranks.barrier("write down nothing", timeout_s=0.5)
    except PeerTimeout as error:
        return str(error)
    return "nobody was missed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
