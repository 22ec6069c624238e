"""What a field of a message may be: its limits, its ranges, and how arrays are marked that travel as raw frames.

Used by `messages.py`, where every field has one of these, by `codec.py`, which reads the marks, and by whoever must fit
a value of his own into a message (`config.py`, which bounds settings as messages are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

MAX_NAME = 128
MAX_TEXT = 4096
MAX_RUNNING = 4096  # leases of one generator
MAX_REWARDS = 64  # reward functions
MAX_METRICS = 64  # that reward functions return of one completion, beside its reward


@dataclass(frozen=True, slots=True)
class ArrayField:
    """Marks a message field that travels as a raw frame."""

    dtype: str
    ndim: int = 1


I32 = Annotated[NDArray[np.int32], ArrayField("int32")]
F32 = Annotated[NDArray[np.float32], ArrayField("float32")]
F32Table = Annotated[NDArray[np.float32], ArrayField("float32", ndim=2)]
F32Cube = Annotated[NDArray[np.float32], ArrayField("float32", ndim=3)]
U8 = Annotated[NDArray[np.uint8], ArrayField("uint8")]
BOOL = Annotated[NDArray[np.bool_], ArrayField("bool")]

Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Finite
_FROM_LIST = Field(strict=False)  # msgpack has no tuples
Pair = Annotated[tuple[Natural, Natural], _FROM_LIST]
Triple = Annotated[tuple[Natural, Natural, Natural], _FROM_LIST]
FileEntry = Annotated[tuple[Name, Natural, Name], _FROM_LIST]
