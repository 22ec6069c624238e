"""The model's config and tokenizer, fetched from the broker: a generator needs nothing of the model on its disk."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from protocol.errors import ProtocolError
from protocol.messages import Bytes, FetchFile
from protocol.session import Session

MAX_FILE_BYTES = 256 << 20


async def fetch_model_files(session: Session, folder: Path) -> Path:
    """Write what the Welcome names into `folder`.

    Raises ProtocolError unless every file has the digest it was announced with.
    """
    assert session.welcome is not None
    await asyncio.to_thread(folder.mkdir, mode=0o700)
    for name, size, digest in session.welcome.files:
        if Path(name).name != name or name in ("", "..") or size > MAX_FILE_BYTES:
            raise ProtocolError("file", f"refusing a model file called {name!r} of {size} bytes")
        content = bytearray()
        while len(content) < size:
            question = FetchFile(name=name, offset=len(content))
            answer = await session.ask(question, bulk=True, what=f"model file {name}")
            if not isinstance(answer, Bytes) or not len(answer.data):
                raise ProtocolError("file", f"model file {name} ended after {len(content)} of {size} bytes")
            content += answer.data.tobytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ProtocolError("file", f"model file {name} does not match its digest")
        await asyncio.to_thread((folder / name).write_bytes, content)
    return folder
