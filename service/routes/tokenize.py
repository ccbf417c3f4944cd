"""POST /tokenize and /detokenize: text to token ids and back, as the model would get it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from lm.errors import UserError
from lm.token_bytes import TokenBytes
from service.codec import Codec
from service.routes.conversations import plan_chat
from service.routes.models import check_model
from service.schemas.requests import Conversation
from service.schemas.tokenize import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from service.services import ServicesDep

FORMS = ("prompt", "messages", "content")

router = APIRouter(tags=["Tokens"])


@router.post("/tokenize", response_model=TokenizeAnswer)
async def tokenize(body: TokenizeRequest, services: ServicesDep) -> Response:
    """Token ids of a text or of a conversation."""
    check_model(services, body.model)
    codec, ready = services.codec, services.engine.known
    ids = await _encode(codec, body)

    def answer() -> bytes:
        id_to_token = codec.tokenizer.backend.id_to_token
        return msgspec.json.encode(
            {
                "tokens": [_piece(codec.token_bytes, token_id) for token_id in ids] if body.with_pieces else ids,
                "count": len(ids),
                "max_model_len": None if ready is None else ready.max_model_len,
                "token_strs": [id_to_token(token_id) or "" for token_id in ids] if body.return_token_strs else None,
            }
        )

    return await _json(answer)


@router.post("/detokenize", response_model=DetokenizeAnswer)
async def detokenize(body: DetokenizeRequest, services: ServicesDep) -> Response:
    """The text of token ids."""
    check_model(services, body.model)

    def answer() -> bytes:
        try:
            ids = services.codec.check_ids(body.tokens)
        except UserError as error:
            raise UserError(f"tokens: {error}", param="tokens") from error
        text = services.codec.tokenizer.decode(ids, skip_special_tokens=False)
        return msgspec.json.encode({"prompt": text, "content": text})

    return await _json(answer)


async def _json(answer: Callable[[], bytes]) -> Response:
    """Made beside the event loop, since an answer may have millions of tokens."""
    return Response(await asyncio.to_thread(answer), media_type="application/json")


async def _encode(codec: Codec, body: TokenizeRequest) -> list[int]:
    """Raises UserError unless there is exactly one thing to encode, and for what cannot be."""
    given = [name for name in FORMS if getattr(body, name) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "none is given"
        raise UserError(f"prompt: send one of {', '.join(FORMS)}; {found}", param="prompt")
    (form,) = given
    adds_special = _adds_special(body)
    if form == "messages":
        chat, _ = plan_chat(codec, body)
        return await codec.encode_chat(chat.messages, add_special_tokens=bool(adds_special), **chat.options)
    for name in Conversation.model_fields:
        if getattr(body, name):
            raise UserError(f"{name}: it goes with messages, and the request has {form}: remove it", param=name)
    try:
        is_added = form == "prompt" if adds_special is None else adds_special
        return await codec.encode(getattr(body, form), add_special_tokens=is_added)
    except UserError as error:
        raise UserError(f"{form}: {error}", param=form) from error


def _adds_special(body: TokenizeRequest) -> bool | None:
    if None not in (body.add_special_tokens, body.add_special) and body.add_special_tokens != body.add_special:
        message = f"add_special: add_special_tokens says {body.add_special_tokens}: send one of the two"
        raise UserError(message, param="add_special")
    return body.add_special if body.add_special_tokens is None else body.add_special_tokens


def _piece(token_bytes: TokenBytes, token_id: int) -> dict[str, Any]:
    data = token_bytes(token_id)
    try:
        return {"id": token_id, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(data)}
