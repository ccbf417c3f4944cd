"""Work that outlives a while in which the database cannot be written: a full disk, a lock of another process."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

RETRY_S = 5.0


async def until_written(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Do `work`, and do it again for as long as the database refuses what it writes.

    It must go on from what the database holds, whatever it did before.
    """
    while True:
        try:
            return await work(*arguments)
        except sqlite3.OperationalError as error:
            logger.error("the database cannot be written, trying again in %.0f s: %s", RETRY_S, error)
        await asyncio.sleep(RETRY_S)
