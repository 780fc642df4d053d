"""Cancels work as soon as the client that waits for it disconnects."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from lmfusion.serving.errors import client_disconnected

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns.

    Raises:
        ApiError: when the client disconnects; `work` is cancelled.
    """
    working = asyncio.create_task(work)
    disconnecting = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        disconnecting.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)
    if working.cancelled():
        raise client_disconnected()
    return working.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
