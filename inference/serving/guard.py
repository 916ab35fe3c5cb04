"""Around a server's application: what may come in at all, and the end of answers that nobody waits for."""

import asyncio
import hmac
import re

from fastapi.responses import JSONResponse

from .protocol import Refusal

LOCAL_NAMES = {b"localhost", b"127.0.0.1", b"[::1]"}
MOST_BYTES = 4 << 20  # of a request: more than any context holds would keep the tokenizer busy for long


class Guard:
    """The application behind the checks of every call: its host, its key, its size.

    A server on loopback answers under loopback's names alone: a web page could let a name of its own lead here.
    """

    def __init__(self, app, api_key: str | None, is_local: bool):
        self.app, self.api_key, self.is_local = app, api_key, is_local

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif (refusal := self._refusal(scope["headers"])) is not None:
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            await JSONResponse(refusal.body(), refusal.status, headers)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
        """Why a request with these headers is not answered."""
        found = dict(headers)
        if self.is_local and re.sub(rb":\d*$", b"", found.get(b"host", b"localhost")).lower() not in LOCAL_NAMES:
            return Refusal(403, "this server is for this machine alone, as localhost or 127.0.0.1", "not_local")
        if self.api_key is not None and not self._has_key(headers):
            message = "a key is needed, as `Authorization: Bearer KEY`, and it must be the one that the server has"
            return Refusal(401, message, "invalid_api_key")
        return None

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key.encode())

    async def _answer(self, scope, receive, send) -> None:
        """Run the application until it has answered, or until the client is gone or has sent too much."""
        messages: asyncio.Queue = asyncio.Queue()
        answering = asyncio.create_task(self.app(scope, messages.get, send))
        listening = asyncio.create_task(listen(receive, messages, answering))
        try:
            await asyncio.wait([answering])
            if not answering.cancelled():
                answering.result()
            elif await listening:
                refusal = Refusal(413, f"the request is larger than {MOST_BYTES:,} bytes", "too_large")
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)
        finally:
            answering.cancel()
            listening.cancel()


async def listen(receive, messages: asyncio.Queue, answering: asyncio.Task) -> bool:
    """Hand on what the client sends; end the answer to one that is gone, or that sends too much, which is True."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or size > MOST_BYTES:
            answering.cancel()
        if size <= MOST_BYTES:
            messages.put_nowait(message)
        if message["type"] == "http.disconnect" or (size > MOST_BYTES and not message.get("more_body")):
            return size > MOST_BYTES and message["type"] != "http.disconnect"
