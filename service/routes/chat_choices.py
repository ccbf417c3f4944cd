"""The choices of a chat, as /v1/chat/completions writes them: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from service.codec import Codec
from service.generation import Answer, Piece
from service.routes.conversations import Turn, whole_calls
from service.routes.logprobs import chat_logprobs, prompt_logprobs
from service.routes.replies import encode, whole_piece
from service.schemas.answers import ChatChoice, ChatMessage
from service.schemas.requests import ChatRequest
from service.tools.plan import ToolPlan

PLAIN_END = b'},"logprobs":null,"finish_reason":null}'


class ChatChoices:
    """For the answers to one request. The role comes once, then what is said, then an empty delta with the reason."""

    def __init__(self, codec: Codec, body: ChatRequest, plan: ToolPlan) -> None:
        self._codec = codec
        self._body = body
        self._plan = plan
        self._has_only_text = body.num_logprobs is None and not (body.return_token_ids or plan.may_call)
        self._heads: dict[int, bytes] = {}
        self._turns: dict[int, Turn] = {}

    def __call__(self, piece: Piece) -> Iterable[bytes]:
        """The choices that tell a piece of a stream, as JSON."""
        index = piece.answer.index
        head = self._heads.get(index)
        if head is not None and self._has_only_text and piece.finish_reason is None:
            return (head + encode(piece.text) + PLAIN_END,)
        choices: list[dict[str, Any]] = []
        if head is None:
            self._heads[index] = b'{"index":%d,"delta":{"content":' % index
            self._turns[index] = Turn(self._plan)
            choices.append(self._begin(piece.answer))
        turn = self._turns[index]
        text, calls = turn.add(piece)
        details = self._details(piece)
        if text or calls or details:
            delta: dict[str, Any] = {} if calls and not text else {"content": text}
            choices.append(_choice(piece.answer, delta | ({"tool_calls": calls} if calls else {})) | details)
        if piece.finish_reason is not None:
            end = _choice(piece.answer, {}, finish_reason=turn.finish_reason(piece.finish_reason))
            choices.append({**end, "stop_reason": piece.answer.stop_reason})
        return map(encode, choices)

    def whole(self, answer: Answer, text: str) -> ChatChoice:
        piece, turn = whole_piece(answer, text), Turn(self._plan)
        content, calls = turn.add(piece)
        choice = {**self._begin(answer), **self._details(piece)}
        choice["message"] = ChatMessage(
            content=None if calls and not content else content, tool_calls=whole_calls(calls)
        )
        if (num_top := self._body.prompt_logprobs) is not None:
            token_bytes = self._codec.token_bytes
            choice["prompt_logprobs"] = prompt_logprobs(
                token_bytes, answer.ask.prompt_ids, answer.prompt_logprobs, num_top
            )
        reason = turn.finish_reason(answer.outcome)
        return ChatChoice(**{**choice, "finish_reason": reason, "stop_reason": answer.stop_reason})

    def _begin(self, answer: Answer) -> dict[str, Any]:
        choice = _choice(answer, {"role": "assistant", "content": ""})
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = answer.ask.prompt_ids
        return choice

    def _details(self, piece: Piece) -> dict[str, Any]:
        """What was asked for about the piece's tokens."""
        details: dict[str, Any] = {}
        if (num_top := self._body.num_logprobs) is not None and piece.logprobs:
            content = chat_logprobs(self._codec.token_bytes, piece.token_ids, piece.logprobs, num_top)
            details["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_token_ids and piece.token_ids:
            details["token_ids"] = piece.token_ids
        return details


def _choice(answer: Answer, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
