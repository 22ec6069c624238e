"""A reward worker: a process of its own that scores completions, one call after the other.

Speaks length-prefixed msgpack on its first two descriptors; what reward code prints goes to stderr. Before each
function it says which one it is about to call, so that whoever kills it at the deadline can name the culprit. It
trusts reward code with nothing but its own process: memory is limited here, time and the process group by `pool.py`.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from typing import Any, BinaryIO

import msgpack

from actors.rewards.registry import Reward, resolve
from protocol.errors import ConfigError
from protocol.parent import leave_with

MEMORY_BYTES = 4 << 30


def main() -> None:
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    leave_with(os.getppid())  # also when reward code hangs and never sees that its pipe is closed
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    rewards: list[Reward] = []
    while (call := read(incoming)) is not None:
        try:
            if "functions" in call:
                rewards = [resolve(*function, call["max_tokens"]) for function in call["functions"]]
                write(outgoing, {"ready": [reward.name for reward in rewards]})
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
        opinions = reward.score(call["completions"], call["completion_ids"], call["columns"])
        values.append([opinion.value for opinion in opinions])
        for found, opinion in zip(metrics, opinions, strict=True):
            found |= {f"{reward.name}/{key}": number for key, number in opinion.metrics.items()}
        if "evaluating" in call:
            for text, opinion, said in zip(call["completions"], opinions, answers, strict=True):
                answer = reward.final_answer(text, opinion)
                if answer is not None:
                    said[reward.name] = answer.encode(errors="replace").decode()
    return {"values": values, "metrics": metrics, "answers": answers}


def read(file: BinaryIO) -> dict[str, Any] | None:
    head = file.read(4)
    if len(head) < 4:
        return None
    return dict(msgpack.unpackb(file.read(struct.unpack("<I", head)[0])))


def write(file: BinaryIO, fields: dict[str, Any]) -> None:
    body = msgpack.packb(fields)
    file.write(struct.pack("<I", len(body)) + body)
    file.flush()


if __name__ == "__main__":
    main()
    sys.exit(0)
