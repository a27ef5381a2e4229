"""A caller of the review's server, for the loop and for attacks."""

from __future__ import annotations

import http.client
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import slidescan as ss
from slidescan.reviews import Review
from slidescan.slides import Slide

TOKEN = "X-Slidescan-Token"


def looked_at(case: Path, slide: Slide | Path | None, **options: Any) -> Review:
    return ss.review(ss.load_result(case, verify=False), slides=slide, reviewer="ann", **options)


class Caller:
    """Asks a server whatever it is told to; it sends nothing by itself but the token."""

    def __init__(self, url: str) -> None:
        origin, self.token = url.split("/#")
        self.url, self.port = url, int(origin.split(":")[-1])
        self.headers: dict[str, str] = {}

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        token: bool = True,
        host: str | None = None,
        **headers: str,
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", host or f"127.0.0.1:{self.port}")
            if token:
                connection.putheader(TOKEN, self.token)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            self.headers = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        if self.headers.get("content-type") == "application/json" and data:
            assert b"\n" not in data
            return answer.status, json.loads(data)
        return answer.status, data

    def get(self, kind: str, **values: Any) -> tuple[int, Any]:
        return self("GET", f"/api/{kind}?q={quote(json.dumps(values))}")

    def post(self, kind: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self("POST", f"/api/{kind}", data, **{"Content_Type": "application/json", **headers})


def picture(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))
