"""Bodies and answers of POST /tokenize and /detokenize, in the forms of vLLM and of llama.cpp."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from service.schemas.answers import Answer
from service.schemas.fields import Only, TokenId
from service.schemas.requests import Conversation
from trainer.strict import Strict

MAX_TEXT_CHARS = 4 << 20
"""Seconds of work for some tokenizers."""
MAX_TOKENS = 2 << 20

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class TokenizeRequest(Conversation):
    """POST /tokenize: a text in `prompt` (as vLLM has it) or in `content` (as llama.cpp has it), or a conversation in
    `messages`."""

    model: str | None = None
    """An id of GET /v1/models. All models of one service have the same tokenizer."""
    prompt: Text | None = None
    content: Text | None = None
    add_special_tokens: bool | None = None
    """Begin as the model wants it, such as with a BOS token. By default true for `prompt`, and false for `content` and
    for `messages`, since chat templates write that themselves."""
    add_special: bool | None = None
    """Another name of `add_special_tokens`."""
    parse_special: Annotated[Any, Only(None, True, mend="special tokens in a text become their ids")] = None
    return_token_strs: bool | None = None
    """Also return the tokens as the vocabulary writes them."""
    with_pieces: bool | None = None
    """Return each token with the text that it stands for."""


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


class TokenPiece(Answer):
    id: int
    piece: str | list[int]
    """Bytes, where they are no whole characters."""


class TokenizeAnswer(Answer):
    tokens: list[int] | list[TokenPiece]
    """Ids; objects with `with_pieces`."""
    count: int
    max_model_len: int | None
    """Longest prompt plus answer, in tokens; null while the engine is not ready."""
    token_strs: list[str] | None = None


class DetokenizeAnswer(Answer):
    prompt: str
    """The text, special tokens included."""
    content: str
    """The same."""
