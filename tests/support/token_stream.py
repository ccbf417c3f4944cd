"""The outputs of one request to an engine client, as a test reads them one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from service.engine.messages import AddRequest, TokenOutput
from service.engine_client import EngineClient, EngineError


class TokenStream(AsyncIterator[TokenOutput]):
    def __init__(self, client: EngineClient, request: AddRequest) -> None:
        """Sends the request. Raises EngineUnavailable."""
        self._client = client
        self._request_id = request.request_id
        self._items: asyncio.Queue[TokenOutput | EngineError] = asyncio.Queue()
        self._is_over = False
        client.submit(request, self._items.put_nowait)

    async def __anext__(self) -> TokenOutput:
        """Raises EngineError when the request failed."""
        if self._is_over:
            raise StopAsyncIteration
        item = await self._items.get()
        self._is_over = isinstance(item, EngineError) or item.finish_reason is not None
        if isinstance(item, EngineError):
            raise item
        return item

    async def tokens(self) -> list[int]:
        """All of them. Abandons the request when it is cancelled."""
        try:
            return [token_id async for output in self for token_id in output.token_ids]
        finally:
            self.abandon()

    def abort(self) -> None:
        self._client.abort(self._request_id)

    def abandon(self) -> None:
        self._client.abandon(self._request_id)
