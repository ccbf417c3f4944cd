"""The choices of a completion, as /v1/completions and /generate write them: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from service.codec import Codec
from service.engine.messages import Logprobs
from service.generation import Answer, Piece
from service.routes.conversations import Turn, whole_calls
from service.routes.logprobs import TextOffsets, prompt_logprobs, prompt_offsets, text_logprobs
from service.routes.replies import encode, whole_piece
from service.schemas.answers import CompletionChoice
from service.schemas.requests import TextAnswer
from service.tools.plan import ToolPlan

PLAIN_END = b',"logprobs":null,"finish_reason":null}'


@dataclass(slots=True)
class _Told:
    """What the choices of one answer have told so far."""

    offsets: TextOffsets
    turn: Turn | None
    """In a conversation that has tools."""
    has_begun: bool = False


class TextChoices:
    """For the answers to one request. Text and finish reason come together, as OpenAI's legacy stream has them."""

    def __init__(self, codec: Codec, body: TextAnswer, plan: ToolPlan | None = None) -> None:
        self._codec = codec
        self._body = body
        self._plan = plan if plan is not None and plan.may_call else None
        has_more = body.echo or body.return_token_ids or self._plan is not None
        self._has_only_text = body.num_logprobs is None and not has_more
        self._heads: dict[int, bytes] = {}
        self._told: dict[int, _Told] = {}

    def __call__(self, piece: Piece) -> Iterable[bytes]:
        """The choice that tells a piece of a stream, as JSON."""
        if self._has_only_text and piece.finish_reason is None:
            index = piece.answer.index
            if (head := self._heads.get(index)) is None:
                head = self._heads[index] = b'{"index":%d,"text":' % index
            return (head + encode(piece.text) + PLAIN_END,)
        return (encode(self._choice(piece)),)

    def whole(self, answer: Answer, text: str, index: int) -> CompletionChoice:
        choice = self._choice(whole_piece(answer, text)) | {"index": index}
        choice["tool_calls"] = whole_calls(choice.get("tool_calls", []))
        if (num_top := self._body.prompt_logprobs) is not None:
            token_bytes = self._codec.token_bytes
            choice["prompt_logprobs"] = prompt_logprobs(
                token_bytes, answer.ask.prompt_ids, answer.prompt_logprobs, num_top
            )
        return CompletionChoice(**choice)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        answer = piece.answer
        told = self._told_of(answer)
        prompt = self._prompt_text(answer) if self._body.echo and not told.has_begun else None
        text, calls = (piece.text, []) if told.turn is None else told.turn.add(piece)
        choice: dict[str, Any] = {"index": answer.index, "text": (prompt or "") + text}
        if calls:
            choice["tool_calls"] = calls
        choice["logprobs"] = self._logprobs(piece, told, prompt)
        choice["finish_reason"] = piece.finish_reason
        if told.turn is not None and piece.finish_reason is not None:
            choice["finish_reason"] = told.turn.finish_reason(piece.finish_reason)
        if piece.finish_reason is not None:
            choice["stop_reason"] = answer.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if not told.has_begun:
                choice["prompt_token_ids"] = answer.ask.prompt_ids
        told.has_begun = True
        return choice

    def _told_of(self, answer: Answer) -> _Told:
        told = self._told.get(answer.index)
        if told is None:
            offsets = TextOffsets(self._codec.token_bytes, shows_special=not answer.ask.skip_special_tokens)
            turn = None if self._plan is None else Turn(self._plan)
            told = self._told[answer.index] = _Told(offsets, turn)
        return told

    def _prompt_text(self, answer: Answer) -> str:
        if answer.ask.prompt_text is not None:
            return answer.ask.prompt_text
        return self._codec.tokenizer.decode(answer.ask.prompt_ids, skip_special_tokens=False)

    def _logprobs(self, piece: Piece, told: _Told, prompt: str | None) -> dict[str, Any] | None:
        """Of the prompt's tokens, too, in the piece that echoes it."""
        num_top = self._body.num_logprobs
        if num_top is None:
            return None
        token_bytes = self._codec.token_bytes
        ids: list[int] = []
        items: list[Logprobs | None] = []
        offsets: list[int] = []
        if prompt is not None:
            ids += piece.answer.ask.prompt_ids
            items += (None, *piece.answer.prompt_logprobs)
            offsets += prompt_offsets(token_bytes, ids, prompt)
            told.offsets.position = len(prompt)
        ids += piece.token_ids
        items += piece.logprobs
        offsets += [told.offsets.add(token_id) for token_id in piece.token_ids]
        return text_logprobs(token_bytes, ids, items, offsets, num_top)
