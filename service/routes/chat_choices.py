"""The choices of a chat, as /v1/chat/completions writes them: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from service.codec import Codec
from service.generation import Answer, Piece
from service.routes.logprobs import chat_logprobs, prompt_logprobs
from service.routes.replies import encode, whole_piece
from service.schemas.answers import ChatChoice, ChatMessage
from service.schemas.requests import ChatRequest

PLAIN_END = b'},"logprobs":null,"finish_reason":null}'


class ChatChoices:
    """For the answers to one request. The role comes once, then text, then an empty delta with the finish reason."""

    def __init__(self, codec: Codec, body: ChatRequest) -> None:
        self._codec = codec
        self._body = body
        self._has_only_text = body.num_logprobs is None and not body.return_token_ids
        self._heads: dict[int, bytes] = {}

    def __call__(self, piece: Piece) -> Iterable[bytes]:
        """The choices that tell a piece of a stream, as JSON."""
        index = piece.answer.index
        head = self._heads.get(index)
        if head is not None and self._has_only_text and piece.finish_reason is None:
            return (head + encode(piece.text) + PLAIN_END,)
        choices: list[dict[str, Any]] = []
        if head is None:
            self._heads[index] = b'{"index":%d,"delta":{"content":' % index
            choices.append(self._begin(piece.answer))
        if piece.text or piece.logprobs or (self._body.return_token_ids and piece.token_ids):
            choices.append(self._tell(piece))
        if piece.finish_reason is not None:
            end = _choice(piece.answer, {}, finish_reason=piece.finish_reason)
            choices.append({**end, "stop_reason": piece.answer.stop_reason})
        return map(encode, choices)

    def whole(self, answer: Answer, text: str) -> ChatChoice:
        told = self._tell(whole_piece(answer, text))
        choice = {**self._begin(answer), **told, "message": ChatMessage(content=text)}
        if (num_top := self._body.prompt_logprobs) is not None:
            token_bytes = self._codec.token_bytes
            choice["prompt_logprobs"] = prompt_logprobs(
                token_bytes, answer.ask.prompt_ids, answer.prompt_logprobs, num_top
            )
        return ChatChoice(**{**choice, "finish_reason": answer.outcome, "stop_reason": answer.stop_reason})

    def _begin(self, answer: Answer) -> dict[str, Any]:
        choice = _choice(answer, {"role": "assistant", "content": ""})
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = answer.ask.prompt_ids
        return choice

    def _tell(self, piece: Piece) -> dict[str, Any]:
        choice = _choice(piece.answer, {"content": piece.text})
        if (num_top := self._body.num_logprobs) is not None:
            content = chat_logprobs(self._codec.token_bytes, piece.token_ids, piece.logprobs, num_top)
            choice["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice


def _choice(answer: Answer, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
