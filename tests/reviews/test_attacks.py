"""Attacks on the review's server, of which none gets anything."""

from __future__ import annotations

import http.client
import json
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slidescan as ss
from slidescan.errors import ConfigError, ResultError, SlideError
from slidescan.reviews import server as server_module
from slidescan.reviews.desk import Desk
from slidescan.reviews.server import ReviewServer
from slidescan.slides import Slide
from tests.callers import TOKEN, Caller, looked_at, picture
from tests.reviewed import running

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class TestAttacks:
    """Each gets one line of JSON at most, and no more than it is due."""

    def refused(self, answer: tuple[int, Any], status: int) -> None:
        assert answer[0] == status, answer
        assert list(answer[1]) == ["error"]
        assert isinstance(answer[1]["error"], str)

    def test_no_token_or_another(self, call: Caller, case: Path) -> None:
        path = "/api/state"
        self.refused(call("GET", path, token=False), 403)
        for wrong in ("", "x", call.token[:-1], call.token + "x", call.token.swapcase(), "\xe9" * 43):
            self.refused(call("GET", path, token=False, X_Slidescan_Token=wrong), 403)
        self.refused(call("GET", path, X_Slidescan_Token=call.token), 403)  # twice
        self.refused(call("GET", f"{path}?token={call.token}", token=False), 403)
        self.refused(call("GET", path, token=False, Cookie=f"token={call.token}"), 403)
        self.refused(call("GET", path, token=False, Authorization=f"Bearer {call.token}"), 403)
        body = json.dumps({"id": "x", "decision": "accept"}).encode()
        self.refused(call("POST", "/api/decide", body, token=False, Content_Type="application/json"), 403)
        for kind in ("items", "crop", "tile", "heat", "boxes", "coverage", "slide", "next", "find", "summary",
                     "nothing"):  # fmt: skip
            self.refused(call("GET", f"/api/{kind}", token=False), 403)
        assert len(call.token) >= 43
        assert not (case / "decisions.jsonl").exists()

    def test_a_name_that_was_bound_to_this_machine(self, call: Caller) -> None:
        """DNS rebinding: the browser believes that evil.example is here, and sends that name."""
        hosts = ["evil.example", f"evil.example:{call.port}", "127.0.0.1", f"127.0.0.1:{call.port + 1}", "localhost"]
        hosts += [f"127.0.0.1:{call.port}.evil.example", f"evil@127.0.0.1:{call.port}", f"[::1]:{call.port}"]
        for host in hosts:
            for path in ("/", "/api/state", "/assets/review.js"):
                self.refused(call("GET", path, host=host), 403)
        with socket.create_connection(("127.0.0.1", call.port), timeout=30) as raw:
            raw.sendall(
                f"GET /api/state HTTP/1.1\r\nHost: 127.0.0.1:{call.port}\r\nHost: evil.example\r\n\r\n".encode()
            )
            assert re.match(rb"HTTP/1.1 40[03] ", raw.recv(4096))
        assert call("GET", "/api/state", host=f"localhost:{call.port}")[0] == 200

    def test_another_sites_page(self, call: Caller, desk: Desk, case: Path) -> None:
        item = desk.answer("items", {"page": 0, "size": 1})["items"][0]
        said = {"id": item["id"], "decision": "accept"}
        own = f"http://127.0.0.1:{call.port}"
        for origin in ("http://evil.example", "null", "", f"https://127.0.0.1:{call.port}", "http://127.0.0.1",
                       f"http://localhost:{call.port}", f"{own}/", f"{own}.evil.example"):  # fmt: skip
            self.refused(call.post("decide", said, Origin=origin), 403)
        for site in ("cross-site", "same-site"):  # another port of 127.0.0.1 is the same site
            self.refused(call.post("decide", said, Sec_Fetch_Site=site), 403)
            self.refused(call("GET", "/api/state", Sec_Fetch_Site=site), 403)
        # What a form can send without asking.
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            self.refused(call.post("decide", said, Content_Type=kind), 415)
        assert not (case / "decisions.jsonl").exists()
        assert call.post("decide", said, Origin=own, Sec_Fetch_Site="same-origin")[0] == 200

    def test_nothing_is_shared(self, call: Caller) -> None:
        """No answer lets another origin read it, a browser keep it, or a page frame it or run what is not ours."""
        for method, path in (("GET", "/"), ("GET", "/assets/review.js"), ("GET", "/api/state"), ("GET", "/x"),
                             ("OPTIONS", "/api/decide"), ("GET", "/api/x")):  # fmt: skip
            call(method, path, Origin=f"http://127.0.0.1:{call.port}", Access_Control_Request_Method="POST")
            assert not [name for name in call.headers if name.startswith("access-control")]
            assert call.headers["cache-control"] == "no-store"
            assert call.headers["x-content-type-options"] == "nosniff"
            assert call.headers["referrer-policy"] == "no-referrer"
            policy = call.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert not {"server", "set-cookie"} & set(call.headers)

    def test_files_that_are_not_the_pages(self, call: Caller) -> None:
        names = [
            "../desk.py",
            "..%2fdesk.py",
            "%2e%2e/%2e%2e/desk.py",
            "..%5cdesk.py",
            "/etc/passwd",
            "%2fetc%2fpasswd",
        ]
        names += [
            "page.js",
            "review.html",
            "review.js%00",
            "review.js/",
            "",
            ".",
            "..",
            "REVIEW.JS",
            "%ff",
            "review%0d%0aX: y",
        ]
        for name in names:
            self.refused(call("GET", f"/assets/{name.replace(' ', '%20')}"), 404)
            assert "x" not in call.headers
        for path in ("/decisions.jsonl", "/api", "/api/", "/docs", "//evil.example/", "/assets", "/.."):
            self.refused(call("GET", path), 404)

    def test_numbers_out_of_range(self, call: Caller) -> None:
        call.get("items", page=0, size=1)
        hostile = [10**9 + 1, 10**30, 0.5, True, "0", "../x", [0], {}, -(2**63)]
        for kind, good, bad in (
            ("tile", {"slide": 0, "level": 10, "x": 0, "y": 0}, {"x": 2, "y": -1, "level": 11}),
            ("tile", {"slide": 0, "level": 0, "x": 0, "y": 0}, {"x": 1, "level": -1, "slide": 1}),
            ("items", {"page": 0, "size": 10}, {"size": 101, "page": -1, "slide": 9, "sort": "id", "min_score": 1.5}),
            ("next", {"listing": 1, "start": 0}, {"start": -1, "listing": None}),
            ("slide", {"slide": 0}, {"slide": -1}),
            ("heat", {"slide": 0}, {"slide": 1}),
            ("boxes", {"slide": 0}, {"slide": None}),
            ("coverage", {"slide": 0}, {"slide": {}}),
        ):
            assert call.get(kind, **good)[0] == 200
            for name in good:
                for value in hostile:
                    self.refused(call.get(kind, **{**good, name: value}), 400)
                for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 4000):
                    query = json.dumps({**good, name: "@"}).replace('"@"', text)
                    self.refused(call("GET", f"/api/{kind}?q={quote(query)}"), 400)
            for name, value in bad.items():
                self.refused(call.get(kind, **{**good, name: value}), 400)
            self.refused(call.get(kind, **good, path="/etc/passwd"), 400)

    def test_crops_too_large(self, call: Caller, desk: Desk) -> None:
        id_ = desk.answer("items", {"page": 0, "size": 1})["items"][0]["id"]
        for fov_um in (1e9, 2049, 0, -64, 7.9, "64", None, True, [64]):
            self.refused(call.get("crop", id=id_, fov_um=fov_um), 400)
        for text in ("NaN", "Infinity", "1e999"):
            query = f'{{"id":"{id_}","fov_um":{text}}}'
            self.refused(call("GET", f"/api/crop?q={quote(query)}"), 400)
        self.refused(call.get("crop", id=id_, fov_um=64, px=100_000), 400)
        _, largest = call.get("crop", id=id_, fov_um=2048)
        assert picture(largest).shape == (640, 640, 3)

    def test_what_is_not_there(self, call: Caller) -> None:
        for id_ in ("", "x", "../../x", "00000000-0000-0000-0000-000000000000"):
            self.refused(call.get("crop", id=id_, fov_um=64), 404)
            self.refused(call.post("decide", {"id": id_, "decision": "accept"}), 404)
        self.refused(call.get("next", listing=99, start=0), 404)
        self.refused(call.get("secrets"), 404)
        self.refused(call.get("__class__"), 404)
        for id_ in (None, 1, ["x"], {"x": 1}, "x" * 2000):
            self.refused(call.get("crop", id=id_, fov_um=64), 400)

    def test_bodies(self, call: Caller, desk: Desk, case: Path) -> None:
        item = desk.answer("items", {"page": 0, "size": 1})["items"][0]
        said = {"id": item["id"], "decision": "accept"}
        for body in (b"", b"{", b"\xff", b"[]", b"null", b'"x"', b"[" * 100_000, b"{}", b'{"id":' + b"9" * 5000 + b"}"):
            self.refused(call.post("decide", body), 400)
        self.refused(call.post("decide", {**said, "note": "x" * 400_000}), 413)
        self.refused(call.post("decide", {**said, "note": "x" * 10_001}), 400)
        for changed in ({"decision": "delete"}, {"decision": None}, {"label": ""}, {"label": "a\nb"}, {"label": 5},
                        {"note": 5}, {"note": "\ud800"}, {"over": 5}, {"reviewer": "ben"}, {"path": "x"}):  # fmt: skip
            self.refused(call.post("decide", {**said, **changed}), 400)
        self.refused(call.post("undo", {"region": item["id"]}), 400)
        self.refused(call("GET", f"/api/state?q={'x' * 5000}"), 400)
        self.refused(call("GET", "/api/state?q={}&q={}"), 400)
        self.refused(call("GET", "/api/state?path=/etc"), 400)
        assert not (case / "decisions.jsonl").exists()
        assert call.post("decide", {**said, "note": "\U0001f600" * 10_000})[0] == 200

    def test_a_body_without_end(self, call: Caller) -> None:
        """Chunks that never end are not kept."""
        with socket.create_connection(("127.0.0.1", call.port), timeout=30) as raw:
            head = f"POST /api/undo HTTP/1.1\r\nHost: 127.0.0.1:{call.port}\r\n{TOKEN}: {call.token}\r\n"
            raw.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(40):
                try:
                    raw.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
                except OSError:  # it hung up
                    break
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")

    def test_connections_that_ask_for_nothing(self, call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many there are, the page's are answered; the oldest that are idle are closed."""
        monkeypatch.setattr(server_module, "_PATIENCE_S", 1000.0)
        with ExitStack() as stack:

            def connect() -> socket.socket:
                return stack.enter_context(socket.create_connection(("127.0.0.1", call.port), timeout=30))

            busy = connect()
            head = f"POST /api/undo HTTP/1.1\r\nHost: 127.0.0.1:{call.port}\r\n{TOKEN}: {call.token}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
            busy.sendall(head.encode())
            assert busy.recv(4096).startswith(b"HTTP/1.1 100")  # it was heard, before all others
            idle = [connect() for _ in range(200)]
            assert call.get("state")[0] == 200
            assert idle[0].recv(1) == b""
            busy.sendall(b"{}")
            assert busy.recv(4096).startswith(b"HTTP/1.1 200")

    def test_a_request_that_is_never_whole(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing, the half of a head, or that after an answer: closed after a while."""
        monkeypatch.setattr(server_module, "_PATIENCE_S", 0.5)
        with running(desk) as server:
            whole = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
            for first, then in ((b"", b""), (b"", whole[:20]), (whole, whole[:20])):
                with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
                    if first:
                        raw.sendall(first)
                        answer = http.client.HTTPResponse(raw)
                        answer.begin()
                        assert (answer.status, bool(answer.read())) == (200, True)
                    raw.sendall(then)
                    assert raw.recv(1) == b""

    def test_methods(self, call: Caller, case: Path) -> None:
        for kind in ("decide", "undo"):
            self.refused(call.get(kind), 405)
            assert call.headers["allow"] == "POST"
        for kind in ("state", "items", "tile", "crop", "find", "summary"):
            self.refused(call.post(kind, {}), 405)
        for method in ("PUT", "DELETE", "PATCH"):
            self.refused(call(method, "/api/decide", b"{}"), 405)
        for method in ("OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
            self.refused(call(method, "/api/decide"), 405)
        for path in ("/", "/assets/review.js"):
            self.refused(call("POST", path, b""), 405)
        assert call("HEAD", "/api/decide")[0] == 405
        assert not (case / "decisions.jsonl").exists()

    def test_headers_in_a_note(self, call: Caller, desk: Desk, case: Path) -> None:
        """A note is kept as it was typed, and becomes neither a header nor a line of the log."""
        item = desk.answer("items", {"page": 0, "size": 1})["items"][0]
        notes = [
            "x\r\nSet-Cookie: a=b\r\n\r\n<script>",
            '"}\n{"schema":1,"event":"undo"}',
            "\0\x1b[31m\u2028",
            "=cmd()",
        ]
        over = None
        for note in notes:
            status, told = call.post("decide", {"id": item["id"], "decision": "accept", "note": note, "over": over})
            over = told["item"]["decided"]["event_id"]
            assert (status, told["item"]["decided"]["note"]) == (200, note)
            assert "set-cookie" not in call.headers
        lines = (case / "decisions.jsonl").read_text().splitlines()
        assert [json.loads(line)["note"] for line in lines] == notes

    def test_only_this_machine(self, desk: Desk) -> None:
        server = ReviewServer(desk)
        assert server._socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=rf"--port {server.port}: cannot be used \(Address already in use\)"):
            ReviewServer(desk, port=server.port)
        server._socket.close()

    def test_no_paths(self, case: Path, slide: Slide, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither answers nor errors name a file; where one matters the terminal does."""
        review = looked_at(case, tmp_path / "gone.svs")
        desk = Desk(review)
        id_ = review.items()[0].id
        (case / "decisions.jsonl").mkdir()
        with running(desk) as server:
            call = Caller(server.url)
            answers = [call.get("items", page=0, size=100)]
            answers += [call.get("crop", id=id_, fov_um=64), call.get("slide", slide=0)]
            self.refused(answers[-1], 500)
            answers += [call.post("decide", {"id": id_, "decision": "accept"})]
            self.refused(answers[-1], 500)
            assert answers[-1][1]["error"].startswith("cannot be read (Is a directory)")
            (case / "detections.parquet").unlink()
            answers += [call.get("boxes", slide=0), call.get("coverage", slide=0)]
            self.refused(answers[-1], 500)
        text = json.dumps(answers)
        for path in (tmp_path, case, Path.home(), Path.cwd()):
            assert len(path.parts) == 2 or str(path) not in text
        assert "gone.svs" not in text
        assert "gone.svs: no such slide" in capsys.readouterr().err

    def test_a_blinded_review_tells_no_score(self, case: Path, slide: Slide) -> None:
        looked = looked_at(case, slide)
        looked.decide(looked.items()[0].id, "accept")
        desk = Desk(looked_at(case, slide, blinded=True))
        state = desk.answer("state", {})
        assert state["sorts"] == ["shuffled", "slide"]
        items = desk.answer("items", {"page": 0, "size": 100})["items"]
        assert [items[0][name] for name in ("score", "evidence", "rank")] == [None] * 3
        scores = {f"{score:.3f}" for score in ss.load_result(case).detections.score.tolist()}
        assert not [score for score in scores if score in json.dumps([state, items])]
        boxes = np.frombuffer(desk.answer("boxes", {"slide": 0}).data, "<f4").reshape(-1, 6)
        assert np.isnan(boxes[:, 4]).all()
        assert (np.lexsort(boxes[:, :4].T) == np.arange(len(boxes))).all()  # by place, not by score
        for kind, values in (
            ("heat", {"slide": 0}),
            ("items", {"page": 0, "size": 1, "sort": "score"}),
            ("items", {"page": 0, "size": 1, "min_score": 0.5}),
        ):
            with pytest.raises(ConfigError, match="blinded"):
                desk.answer(kind, values)

    def test_whatever_is_asked(self, case: Path, slide: Slide) -> None:
        """No value makes a desk fail in another way than by a line of its own."""
        desk, said = Desk(looked_at(case, slide)), [0]
        names = ["slide", "level", "x", "y", "id", "fov_um", "page", "size", "listing", "start", "decision", "note",
                 "over", "x_l0", "y_l0", "reach_l0"]  # fmt: skip
        json_values = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        )

        @settings(max_examples=150, deadline=None)
        @given(st.sampled_from(sorted(desk.kinds)), st.dictionaries(st.sampled_from(names), json_values) | json_values)
        def ask(kind: str, values: Any) -> None:
            try:
                desk.answer(kind, values)
            except (ConfigError, SlideError, ResultError) as exc:
                said.append(len(str(exc)))

        ask()
        assert max(said) < 400
        assert not (case / "decisions.jsonl").exists()
