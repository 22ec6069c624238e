"""A process with a vLLM engine in it, to be killed by a test.

Run with a model folder, it prints the engine core's pid and the names of the variables that vLLM has set meanwhile.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from pathlib import Path

from actors.engine import EngineOptions
from actors.vllm_engine import VLLMEngine
from actors.vllm_settings import environment


async def main() -> None:
    os.environ.update(environment("cpu"))
    before = set(os.environ)
    engine = VLLMEngine(EngineOptions(Path(sys.argv[1]), max_model_len=256))
    await engine.start()
    [core] = multiprocessing.active_children()
    print(core.pid, *sorted(set(os.environ) - before), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
