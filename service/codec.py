"""Text to token ids for the model that is served: its tokenizer, its chat template, the size of its vocabulary."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from lm.config import load_config
from lm.errors import UserError
from lm.messages import Message
from lm.template import ChatTemplate, RenderOptions, load_template
from lm.token_bytes import TokenBytes, token_bytes
from lm.tokenizer import Tokenizer, load_tokenizer

LONG_TEXT = 8192  # characters; what takes longer than a millisecond leaves the event loop to others


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One for a base model and everything that was fine-tuned from it."""

    tokenizer: Tokenizer
    template: ChatTemplate
    token_bytes: TokenBytes
    vocab_size: int
    """Rows of the model's embedding: ids in a request must lie below."""
    longest_token: int
    """In bytes. A text has at least one token for so many characters."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises UserError for text that is not Unicode."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(
        self, messages: Sequence[Message], *, add_special_tokens: bool = False, **options: Unpack[RenderOptions]
    ) -> list[int]:
        """Raises UserError for messages and options that the template refuses. The prompt ends where an answer begins,
        unless they say otherwise. Special tokens around it are the template's, as a rule.
        """
        if not options.get("continue_final_message"):
            options.setdefault("add_generation_prompt", True)

        def work() -> list[int]:
            text = self.template.render(messages, **options)
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        is_long = sum(len(message.get("content") or "") for message in messages) >= LONG_TEXT
        return await asyncio.to_thread(work) if is_long or options.get("tools") else work()

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Raises UserError for an id that the model does not have."""
        for token_id in ids:
            if token_id >= self.vocab_size:
                raise UserError(f"{token_id} is not a token of this model, whose ids end at {self.vocab_size - 1}")
        return list(ids)


def load_codec(folder: Path) -> Codec:
    """Raises UserError when the tokenizer, the template or the config of a model folder cannot be used."""
    tokenizer = load_tokenizer(folder)
    bytes_of = token_bytes(tokenizer)
    return Codec(
        tokenizer=tokenizer,
        template=load_template(folder, tokenizer),
        token_bytes=bytes_of,
        vocab_size=load_config(folder).vocab_size,
        longest_token=max(len(bytes_of(token_id)) for token_id in range(tokenizer.backend.last_id + 1)),
    )
