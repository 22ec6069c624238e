"""A reward worker: a process of its own that scores completions, one call after the other.

Speaks through `pipe.py`; what reward code prints goes to stderr. Before each function it says which one it is about to
call, so that whoever kills it at the deadline can name the culprit. It trusts reward code with nothing but its own
process: memory is limited here, time and the process group by `pool.py`.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from typing import Any, BinaryIO

from actors.rewards.pipe import read, start_of_worker, write
from actors.rewards.registry import Reward, resolve
from protocol.errors import ConfigError

MEMORY_BYTES = 4 << 30


def main() -> None:
    incoming, outgoing = start_of_worker()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    rewards: list[Reward] = []
    while (call := read(incoming)) is not None:
        try:
            if "functions" in call:
                rewards = [replace(resolve(*each, call["max_tokens"]), name=name) for name, *each in call["functions"]]
                write(outgoing, {"ready": True})
            else:
                write(outgoing, score(rewards, call, outgoing))
        except ConfigError as error:
            write(outgoing, {"failed": str(error)[:2000]})
        except Exception as error:  # reward code is the user's: whatever it raises is an answer, not our end
            write(outgoing, {"failed": f"{type(error).__name__}: {error}"[:2000]})


def score(rewards: list[Reward], call: dict[str, Any], outgoing: BinaryIO) -> dict[str, Any]:
    """Values [functions][completions]; metrics of each completion by FUNCTION/KEY; its answers in an evaluation."""
    values: list[list[float | None]] = []
    metrics: list[dict[str, float]] = [{} for _ in call["completions"]]
    answers: list[dict[str, str]] = [{} for _ in call["completions"]]
    for reward in rewards[: call.get("num_functions")]:
        write(outgoing, {"calling": reward.name})
        opinions = reward.score(call["completions"], call["completion_ids"], call["columns"], call["version"])
        values.append([opinion.value for opinion in opinions])
        for found, opinion in zip(metrics, opinions, strict=True):
            found |= {f"{reward.name}/{key}": number for key, number in opinion.metrics.items()}
        if "evaluating" in call:
            for text, opinion, said in zip(call["completions"], opinions, answers, strict=True):
                answer = reward.final_answer(text, opinion)
                if answer is not None:
                    said[reward.name] = answer.encode(errors="replace").decode()
    return {"values": values, "metrics": metrics, "answers": answers}


if __name__ == "__main__":
    main()
    sys.exit(0)
