"""The bytes that single tokens stand for. Torch-free.

Decoding a token alone does not tell them: part of a character comes out as U+FFFD, and SentencePiece drops a space
from the start of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lm.sentencepiece_backend import SPACE, SentencePieceBackend
from lm.tiktoken_file import BYTE_CHARACTERS
from lm.tokenizer import Tokenizer
from lm.tokenizers_backend import Backend, TokenizersBackend

BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The tokens of one tokenizer, each looked up once."""

    backend: Backend
    spelled: Mapping[int, str]
    """Tokens that stand for their own text."""
    special: frozenset[int]
    """Tokens that are no text, and are left out of it unless they are asked for."""
    is_byte_level: bool
    known: dict[int, bytes] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def __call__(self, token_id: int) -> bytes:
        """Nothing for an id that the tokenizer lacks."""
        found = self.known.get(token_id)
        if found is None:
            found = self.known[token_id] = self._look_up(token_id)
        return found

    def text(self, token_id: int) -> str:
        """With U+FFFD for what is not a whole character."""
        found = self.texts.get(token_id)
        if found is None:
            found = self.texts[token_id] = self(token_id).decode("utf-8", "replace")
        return found

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self.spelled:
            return self.spelled[token_id].encode()
        token = self.backend.id_to_token(token_id) or ""
        if self.is_byte_level:
            return bytes(BYTE_OF[character] for character in token if character in BYTE_OF)
        if byte := BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ").encode()


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        return TokenBytes(backend, backend.added, backend.special - {backend.unknown}, is_byte_level=False)
    assert isinstance(backend, TokenizersBackend)
    added = backend.inner.get_added_tokens_decoder()
    spelled = {token_id: token.content for token_id, token in added.items()}
    special = frozenset(token_id for token_id, token in added.items() if token.special)
    return TokenBytes(backend, spelled, special, is_byte_level=_is_byte_level(backend))


def _is_byte_level(backend: TokenizersBackend) -> bool:
    decoder = backend.inner.decoder
    return decoder is not None and '"ByteLevel"' in decoder.__getstate__().decode()
