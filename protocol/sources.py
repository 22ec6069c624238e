"""Where rows come from: `data.train`, `data.eval` and `warmup.data` name one source, or several with commas.

A source is a file, a folder or a Hugging Face NAME[:SUBSET]; `#N` behind it takes N of its rows (`broker/records.py`).
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from protocol.errors import ConfigError

_SAMPLED = re.compile(r"(.*)#(\d+)")


class Source(NamedTuple):
    """One file, folder or Hub name, and how many of its rows are taken (None: all)."""

    name: str
    num_rows: int | None = None

    def __str__(self) -> str:
        return self.name if self.num_rows is None else f"{self.name}#{self.num_rows}"


def parse_sources(text: str) -> list[Source]:
    """The sources of a setting. A path that is there is one source, whatever characters it has.

    Raises ConfigError for a source without a name, or of no rows.
    """
    if os.path.exists(text):
        return [Source(text)]
    return [_parse(part.strip(), text) for part in text.split(",")]


def absolute_sources(text: str) -> str:
    """The same sources, with files and folders named from the root."""
    sources = parse_sources(text)
    return ",".join(str(s._replace(name=os.path.abspath(s.name)) if os.path.exists(s.name) else s) for s in sources)


def from_list(value: object) -> object:
    """What a recipe may write as a list of sources, as text. Raises ValueError for a name that a comma would cut."""
    if not isinstance(value, list):
        return value
    for name in value:
        if not isinstance(name, str) or "," in name:
            raise ValueError(f"a list of sources has names without a comma, got {name!r}; rename that file or folder")
    return ",".join(value)


def _parse(part: str, text: str) -> Source:
    if os.path.exists(part):
        return Source(part)
    sampled = _SAMPLED.fullmatch(part)
    source = Source(sampled[1], int(sampled[2])) if sampled else Source(part)
    if not source.name or source.num_rows == 0:
        raise ConfigError(
            f"expected sources of rows with commas between them, each with #N behind it for N of its rows, got {part!r}"
            f" in {text!r}; set data.train, data.eval or warmup.data"
        )
    return source
