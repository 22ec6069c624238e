"""The reward model's worker: a process of its own that scores conversations by a sequence-classification head.

Speaks through `pipe.py`. A conversation is read with the reward model's own tokenizer and chat template, whatever the
policy's are; without a template it is the text of its messages, with the completion right behind. That a score does not
depend on what shares its batch, and equals that of a plain call, rests on `SequenceScorer._pad_id` and on padding on
the right: the head reads the last token that is no padding. What has no score has a reason, and is never a number.

Legend: B conversations of a batch, T tokens of the longest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from actors.rewards.pipe import read, start_of_worker, write
from protocol.errors import ConfigError

MAX_REASON = 2000
NO_LIMIT_TOKENS = 1 << 30  # tokenizers without a limit say some number above it


class SequenceScorer:
    """Model and tokenizer of one folder. Raises ConfigError if they cannot be used."""

    def __init__(
        self, path: str, label: int | None, max_tokens: int, device: str, dtype: str, trust_remote_code: bool
    ) -> None:
        kinds = {"trust_remote_code": trust_remote_code}
        self._tokenizer = AutoTokenizer.from_pretrained(path, **kinds)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **kinds
        )
        if loaded["missing_keys"]:
            raise ConfigError(
                f"expected a trained reward model in {path}, its weights lack {min(loaded['missing_keys'])}: is it a "
                "language model without a head? set rewards.model.path"
            )
        model.config.use_cache = False
        self._model = model.to(device).eval()
        self._column, self._device = label or 0, device
        self._config = model.config.get_text_config()
        self._has_pad_id = self._config.pad_token_id is not None
        self._max_tokens = max_tokens or min(
            getattr(self._config, "max_position_embeddings", NO_LIMIT_TOKENS), self._tokenizer.model_max_length
        )

    def score(self, conversations: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Values and reasons, one of each for each conversation: None, or ""."""
        read_as = [self._tokens(conversation) for conversation in conversations]
        values: list[float | None] = [None] * len(read_as)
        reasons = [ids if isinstance(ids, str) else "" for ids in read_as]
        places = [place for place, reason in enumerate(reasons) if not reason]
        if places:
            for place, value in zip(places, self._forward([read_as[place] for place in places]), strict=True):
                values[place] = value if abs(value) < float("inf") else None  # false of NaN too
                if values[place] is None:
                    reasons[place] = f"expected a finite score, got {value}"
        return {"values": values, "reasons": reasons}

    def _tokens(self, conversation: Mapping[str, Any]) -> list[int] | str:
        """Token ids, or the reason why there are none."""
        messages, completion = conversation["messages"], conversation["completion"]
        try:
            if self._tokenizer.chat_template:
                whole = [*messages, {"role": "assistant", "content": completion}]
                ids = self._tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
            else:
                ids = self._tokenizer.encode("\n".join(str(each["content"]) for each in messages) + completion)
        except Exception as error:  # a template is code, and may refuse these messages in any way
            return f"its chat template raised {type(error).__name__}: {error}"[:MAX_REASON]
        if not 0 < len(ids) <= self._max_tokens:
            return (
                f"expected a conversation of 1 to {self._max_tokens} tokens of the reward model, got {len(ids)}; set "
                "rewards.model.max_tokens, or shorter data.max_prompt_tokens and sampling.max_tokens"
            )
        return list(ids)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """[B] scores of token ids [B, T], T padded on the right."""
        longest, pad = max(map(len, rows)), self._pad_id(rows)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
        return [float(value) for value in logits[:, self._column].float().cpu()]

    def _pad_id(self, rows: Sequence[Sequence[int]]) -> int:
        """The model's own; of a model without one an id that no row has, which is then what its head takes as padding.

        Such a model, called with one text, reads its last token, whichever that is.
        """
        if self._has_pad_id:
            return int(self._config.pad_token_id)
        used = set().union(*rows)
        self._config.pad_token_id = next(number for number in count() if number not in used)
        return int(self._config.pad_token_id)


def main() -> None:
    incoming, outgoing = start_of_worker()
    transformers_logging.disable_progress_bar()
    scorer: SequenceScorer | None = None
    while (call := read(incoming)) is not None:
        try:
            if scorer is None:
                scorer = SequenceScorer(**call)
                write(outgoing, {"ready": True})
            else:
                write(outgoing, scorer.score(call["conversations"]))
        except ConfigError as error:
            write(outgoing, {"failed": str(error)[:MAX_REASON]})
        except Exception as error:  # a folder that transformers refuses, or a card without room: an answer, not our end
            write(outgoing, {"failed": f"{type(error).__name__}: {error}"[:MAX_REASON]})


if __name__ == "__main__":
    main()
    sys.exit(0)
