"""Between text and token ids for rollouts: the model's tokenizer, and what its chat template puts between two turns.

Runs in the generator process. Token ids are what is trained, so text is made of them and never back into them, but for
what the model did not write.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from actors.rollout import RolloutFailed
from protocol.types import Tokens

MARK = "TETHER-WAS-HERE"  # stands in for what the model wrote where the template is rendered


class Texts:
    """Of one model folder."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._chat: Any = None  # the tokenizer with its template, read when a rollout first wants it
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        settings = json.loads((model / "config.json").read_text())
        self.vocabulary = int(settings.get("vocab_size") or settings.get("text_config", {})["vocab_size"])

    def encode(self, text: str) -> Tokens:
        """Ids of a text, without special tokens around it; half of a surrogate pair becomes a question mark."""
        readable = text.encode(errors="replace").decode()
        return np.array(self._tokenizer.encode(readable, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Tokens, *, special: bool = False) -> str:
        """Text of some ids, with the names of special tokens or without."""
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=not special))

    async def between_turns(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """What the chat template puts behind an assistant's words: the end of its turn, these messages, and the
        beginning of its next turn.

        Raises RolloutFailed if there is no template, or it does not keep the assistant's words together.
        """
        if self._chat is None:
            self._chat = await asyncio.to_thread(self._read_chat)  # imports what renders templates: takes seconds
        if not self._chat.chat_template:
            raise RolloutFailed("the model has no chat template; observe tokens of your own between the turns")
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, *map(dict, messages)]
        text = self._chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, mark, behind = text.rpartition(MARK)
        if not mark or MARK in before:
            raise RolloutFailed("the chat template changes an assistant's words; observe tokens of your own instead")
        return self.encode(behind)

    def _read_chat(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._model)
