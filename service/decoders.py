"""The decoder that fits a tokenizer, with what it remembers of the tokens. One `Decoders` for all answers of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from lm.token_bytes import TokenBytes
from lm.tokenizer import Tokenizer
from lm.tokenizers_backend import TokenizersBackend
from service.detokenizer import ByteDecoder, Decode, Decoder, IncrementalDecoder


class Decoders:
    def __init__(self, tokenizer: Tokenizer, token_bytes: TokenBytes) -> None:
        decode = {skip: partial(tokenizer.decode, skip_special_tokens=skip) for skip in (False, True)}
        self._shown: dict[bool, _ShownBytes] = {}
        if _joins_bytes(tokenizer):
            self._shown = {skip: _ShownBytes(decode[skip], token_bytes) for skip in decode}
        self._decode = {skip: _remembering(decode[skip]) for skip in decode}

    def new(self, *, skip_special_tokens: bool) -> Decoder:
        if self._shown:
            return ByteDecoder(self._shown[skip_special_tokens])
        return IncrementalDecoder(self._decode[skip_special_tokens])


def _joins_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a text is the bytes of its tokens, one behind the other, and nothing else is done to them."""
    backend = tokenizer.backend
    decoder = backend.inner.decoder if isinstance(backend, TokenizersBackend) else None
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"


class _ShownBytes(dict[int, bytes]):
    """What each token adds to the text, by its id; looked up once."""

    def __init__(self, decode: Decode, token_bytes: TokenBytes) -> None:
        self._decode = decode
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        """What the tokenizer does not show as bytes, such as a special token that is left out, is as it shows it."""
        text, data = self._decode([token_id]), self._token_bytes(token_id)
        shown = self[token_id] = data if data.decode("utf-8", "replace") == text else text.encode()
        return shown


def _remembering(decode: Decode) -> Decode:
    """`decode` that remembers what each token alone is: a window begins with one, most of the time."""
    alone: dict[int, str] = {}

    def remembered(ids: Sequence[int]) -> str:
        if len(ids) != 1:
            return decode(ids)
        text = alone.get(ids[0])
        if text is None:
            text = alone[ids[0]] = decode(ids)
        return text

    return remembered
