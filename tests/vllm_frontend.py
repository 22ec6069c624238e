"""A process with a vLLM engine in it, to be killed: `python tests/vllm_frontend.py MODEL_FOLDER` prints the engine core's pid."""

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
    engine = VLLMEngine(EngineOptions(Path(sys.argv[1]), max_model_len=256))
    await engine.start()
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
