"""The review page over HTTP, for one person on this machine: a thin skin over `Desk`.

Whoever else can reach the port gets nothing: each request for data shows the token, which is in the printed URL behind
the ``#``, where no request line, log or other server sees it. It travels in a header and not in a cookie: browsers give
a cookie of 127.0.0.1 to every port there, other users' too. A name that resolves to 127.0.0.1 (DNS rebinding) is no
allowed Host; another site's page is no allowed Origin; nothing is cached, framed or shared. A connection that asks for
nothing is closed, the oldest at once where there are many.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from slidescan.errors import ConfigError
from slidescan.reviews.desk import WRITES, Desk, Picture
from slidescan.reviews.page import asset
from slidescan.reviews.refusals import MOST_ASKED_BYTES, Refusal, answered

__all__ = ["CARRIER", "ReviewServer", "make_app"]

CARRIER = "X-Slidescan-Token"
_LOOPBACK = "127.0.0.1"
_HTTP_PORT = 80
_TOKEN_BYTES = 32  # of randomness: 256 bits
_MOST_QUERY_CHARS = 4096
_MOST_CONNECTIONS = 64  # a browser makes six; of the 1024 files that a process may have open most are for slides
_PATIENCE_S = 10.0  # for the head of a request; a browser that connects ahead of need connects again
_GRACE_S = 1  # how long an end waits for requests in flight; a decision takes ms
# The one style that OpenSeadragon 6.1.1 puts into the document: no grey flash where a touch screen is touched.
_OPENSEADRAGON_STYLE = "sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE="
_HEADERS = {
    # 'self' is only what `page` lists. Blobs are pictures that came over the transport.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self' '{_OPENSEADRAGON_STYLE}'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ReviewServer:
    """A review page on a port of 127.0.0.1; bound when made, so that `url` is true before `run`."""

    def __init__(self, desk: Desk, *, port: int = 0) -> None:
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((_LOOPBACK, port))
        except (OSError, OverflowError) as exc:
            self._socket.close()
            why = exc.strerror if isinstance(exc, OSError) else "it is no port"
            raise ConfigError(f"--port {port}: cannot be used ({why}); 0 takes any free one") from exc
        self._socket.listen()  # from now on who comes waits, and is not refused
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(desk, self._token, self.port),
                http=_Connection,
                backlog=_MOST_CONNECTIONS,  # as many are accepted in one go, before any is closed
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    @property
    def url(self) -> str:
        """The page with its token."""
        return f"http://{_LOOPBACK}:{self.port}/#{self._token}"

    def run(self) -> None:
        """Answer until Ctrl-C or `stop`."""
        # Of pictures that are not waited for at the end it would print tracebacks.
        log, while_on = logging.getLogger("uvicorn.error"), lambda _: not self._server.should_exit
        log.addFilter(while_on)
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:  # which uvicorn raises again once it has ended
            return
        finally:
            log.removeFilter(while_on)
            self._socket.close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.should_exit = True


class _Connection(H11Protocol):
    """One that asks for nothing is closed: after a while, or, known to be idle the longest, when there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._since_s, self._asked = self.loop.time(), self.cycle
        self._look_again()
        if len(self.connections) > _MOST_CONNECTIONS:
            idle = [each for each in self.connections if isinstance(each, _Connection) and not each.at_work]
            if idle:
                oldest = min(idle, key=lambda each: each._since_s)
                self.connections.discard(oldest)  # or the next, of many that come at once, would choose it, too
                oldest.transport.abort()

    @property
    def at_work(self) -> bool:
        """Whether something was asked that is not answered."""
        return not getattr(self.cycle, "response_complete", True)  # there is none before the first

    def _look_again(self) -> None:
        self.loop.call_later(_PATIENCE_S, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.at_work or self.cycle is not self._asked:
            self._since_s, self._asked = self.loop.time(), self.cycle
            self._look_again()
        else:
            self.transport.close()


def make_app(desk: Desk, token: str, port: int) -> ASGIApp:
    """Return the page and its requests as an ASGI application."""

    async def page(request: Request) -> Response:
        return await served(request, "review.html")

    async def file(request: Request) -> Response:
        return await served(request, request.path_params["name"])

    async def served(request: Request, name: str) -> Response:
        found = None if name == "review.html" and request.path_params else asset(name)
        if found is None:
            raise HTTPException(404, "no such file")
        return Response(found[0], media_type=found[1])

    async def data(request: Request) -> Response:
        _check_token(request, token)
        kind = request.path_params["kind"]
        if kind not in desk.kinds:
            raise HTTPException(404, "no such request")
        method = "POST" if kind in WRITES else "GET"
        if request.method != method:
            raise HTTPException(405, f"expected {method}", {"Allow": method})
        text = await _body(request) if method == "POST" else _query(request)
        return await run_in_threadpool(_answered, desk, kind, _values(text))

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/assets/{name}", file),
            Route("/api/{kind}", data, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ],
        exception_handlers={HTTPException: _refused, Exception: _broken},
    )
    app.router.redirect_slashes = False
    return _Guarded(app, port)


class _Guarded:
    """Refuses requests by another name or from another site, and says on each answer what browsers must not do."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        # A browser leaves HTTP's own port out.
        self._hosts = frozenset(f"{name}{end}" for name in (_LOOPBACK, "localhost") for end in _ends(port))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] != "http":
            raise RuntimeError(f"expected a request, got {scope['type']}")
        why = self._refusal(scope)
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = _told(403, why) if why else self._app
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return "expected to be called 127.0.0.1 or localhost, with the port"
        # A browser names the origin of every POST, and of a GET from another origin.
        origins = headers.getlist("origin")
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return "this page belongs to another site"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"] != "/":
            return "this page belongs to another site"
        return None


def _ends(port: int) -> tuple[str, ...]:
    return (f":{port}", "") if port == _HTTP_PORT else (f":{port}",)


def _check_token(request: Request, token: str) -> None:
    given = request.headers.getlist(CARRIER)
    if len(given) != 1 or not hmac.compare_digest(given[0].encode(), token.encode()):
        raise HTTPException(403, "open the page by the URL that slidescan review printed")


async def _body(request: Request) -> bytes:
    # A page of another site cannot send this type without asking first, which nothing here answers.
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected application/json")
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_ASKED_BYTES:
                raise HTTPException(413, f"expected at most {MOST_ASKED_BYTES} bytes")
    except ClientDisconnect as exc:
        raise HTTPException(400, "the request was broken off") from exc
    return body


def _query(request: Request) -> bytes:
    if set(request.query_params) - {"q"} or len(request.query_params.getlist("q")) > 1:
        raise HTTPException(400, "expected one q=")
    text = request.query_params.get("q", "{}")
    if len(text) > _MOST_QUERY_CHARS:
        raise HTTPException(400, f"expected at most {_MOST_QUERY_CHARS} characters")
    return text.encode(errors="replace")


def _values(text: bytes) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise HTTPException(400, "expected JSON") from exc


def _answered(desk: Desk, kind: str, values: Any) -> Response:
    answer = answered(desk, kind, values, lambda line: sys.stderr.write(f"{line}\n"))
    if isinstance(answer, Refusal):
        return _json(answer.status, {"error": answer.why})
    if isinstance(answer, Picture):
        return Response(answer.data, media_type=answer.media_type)
    return _json(200, answer)


def _json(status: int, values: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Response(text.encode(), status, headers, media_type="application/json")


def _told(status: int, why: str) -> Response:
    return _json(status, {"error": " ".join(why.split())})


async def _refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return _json(exc.status_code, {"error": exc.detail}, dict(exc.headers or {}))


async def _broken(request: Request, exc: Exception) -> Response:
    return _told(500, "failed; the terminal says why")
