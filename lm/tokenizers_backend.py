"""What every kind of tokenizer can do, and the kind that the `tokenizers` library runs. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tokenizers

from lm.errors import UserError
from lm.tokenizer_settings import TokenSettings

LONG = 1000  # ids; with fewer, `decode` is faster than the call that lets others run


class Backend(Protocol):
    """Valid Unicode in, and for ids that the tokenizer lacks nothing out."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""

    @property
    def last_id(self) -> int:
        """The highest id of all tokens; -1 where there is none."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, special tokens spelled in it included."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the index behind its last character. The ends may fall."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids`."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text."""

    def id_to_token(self, token_id: int) -> str | None:
        """The text of a token by its id."""

    def to_json(self) -> str | None:
        """As a tokenizer.json; None for what that format does not hold."""


@dataclass(frozen=True, slots=True)
class TokenizersBackend:
    """A tokenizer.json, or what was converted into one.

    Long texts go through the library's calls for batches: only those let other threads run meanwhile.
    """

    inner: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    @property
    def last_id(self) -> int:
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        (encoding,) = self.inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        (encoding,) = self.inner.encode_batch([text], add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if len(ids) > LONG:
            (text,) = self.inner.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        else:
            text = self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_to_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.inner.id_to_token(token_id)

    def to_json(self) -> str | None:
        return self.inner.to_str()


def load_tokenizer_json(path: Path, data: bytes, settings: TokenSettings) -> TokenizersBackend:
    """The tokens that the settings know and tokenizer.json does not are added, in transformers' order.

    Raises UserError when `data`, the content of `path`, is damaged.
    """
    try:
        inner = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}", param="model") from error
    inner.no_truncation()
    inner.no_padding()
    inner.add_tokens(list(settings.declared.values()))
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens([token for token in settings.special if token.content not in known])
    return TokenizersBackend(inner)
