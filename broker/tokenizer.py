"""Text to token ids and back, with the model's own chat template; without torch.

Runs in the broker. `transformers` would import torch for this, so the two files it reads are read here:
tokenizer.json by the `tokenizers` library, the chat template by jinja2 in its sandbox, with the same names in scope
(a test compares the results).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from protocol.errors import ConfigError
from protocol.types import Tokens

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a generator needs of a model folder beside the weights; not every model has all of them."""


class ChatTokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"expected a fast tokenizer (tokenizer.json) in the model folder {folder}, found none; "
                "save one there with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER), or set model.path"
            )
        self.folder = folder
        self._tokenizer = Tokenizer.from_file(str(path))
        self._settings = _read_json(folder / "tokenizer_config.json")
        self._template = self._compile_template()

    @property
    def size(self) -> int:
        """Above every token id that it knows."""
        return self._tokenizer.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def end_of_sequence(self) -> int:
        """Token id that ends a completion. Raises ConfigError if the folder does not say."""
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.folder / name).get("eos_token_id")
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
        found = self._tokenizer.token_to_id(_token_text(self._settings.get("eos_token")) or "")
        if found is None:
            raise ConfigError(f"expected an eos_token_id in {self.folder / 'config.json'}, found none; add it")
        return int(found)

    def encode(self, text: str) -> Tokens:
        """Token ids [T] of plain text, with the special tokens that the tokenizer puts around it."""
        return np.array(self._ids(text, add_special_tokens=True), np.int32)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Tokens:
        """Token ids [T] of a conversation, ready for the assistant's answer."""
        return np.array(self._ids(self.render(messages)), np.int32)

    def encode_answer(self, text: str) -> Tokens:
        """Token ids [T] of what the assistant should write, ended."""
        return np.array([*self._ids(text), self.end_of_sequence], np.int32)

    def decode(self, tokens: Tokens, *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=skip_special_tokens))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, as the template writes it."""
        if self._template is None:
            raise ConfigError(
                f"the rows are chat messages, but the model folder {self.folder} has no chat template; "
                "use an instruct model, or put a chat_template.jinja into the folder"
            )
        specials = {
            name: _token_text(value)
            for name, value in self._settings.items()
            if name.endswith("_token") and _token_text(value)
        }
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **specials)
        except Exception as error:  # a template is code of its own: what it is given may break any of its lines
            said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"the chat template of {self.folder} refuses the messages of a row: {said}; the last of them is "
                f"{repr(messages[-1])[:200]}; mend or remove that row, or take another model"
            ) from None

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Half of a surrogate pair, which JSON can spell and the tokenizer refuses, becomes a question mark."""
        readable = text.encode(errors="replace").decode()
        return list(self._tokenizer.encode(readable, add_special_tokens=add_special_tokens).ids)

    def _compile_template(self) -> jinja2.Template | None:
        beside = self.folder / "chat_template.jinja"
        source = beside.read_text() if beside.is_file() else self._settings.get("chat_template")
        if isinstance(source, list):  # several named templates: the default one
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if not source:
            return None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(source)


def model_folder(path: str, setting: str = "model.path") -> Path:
    """The folder itself, or where the Hub's files of that name lie after being fetched.

    Raises ConfigError if there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # the hub's client has no common base for "no such name", "no network" and "no access"
        raise ConfigError(
            f"expected {setting} to be a folder or a Hugging Face name that can be reached, got {path} "
            f"({type(error).__name__}); download it elsewhere and set {setting} to its folder"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
