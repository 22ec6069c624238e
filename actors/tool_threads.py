"""The threads of a generator's event loop: of `asyncio.to_thread`, by which rollouts call tools that block.

A thread cannot be ended, so a tool that hangs keeps its own for good. That this costs its sample and nothing else, not
the engine, which works in such threads too, and not the generator's end, rests on there always being one more thread
and on `shutdown`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

MAX_THREADS = 4096  # idle ones are taken first; beyond what the system gives, a call raises


class ToolThreads(ThreadPoolExecutor):
    def __init__(self) -> None:
        super().__init__(MAX_THREADS, thread_name_prefix="tool")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work. Waits for nothing: the process ends with threads that hang."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)
