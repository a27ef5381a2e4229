"""The review's server, and the command that runs it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import slidescan as ss
from slidescan import cli
from slidescan.archive import read_listing
from slidescan.reviews import Review
from slidescan.reviews.case import Case
from slidescan.reviews.desk import Desk
from slidescan.slides import Slide
from tests.archives import write_slide
from tests.callers import Caller, picture
from tests.discs import ORACLE
from tests.reviewed import APART, running

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_the_loop(call: Caller, case: Path) -> None:
    """List, look, decide, undo; each is in the log when its answer comes."""
    _, state = call.get("state")
    assert (state["reviewer"], state["total"], state["left"], state["of"]) == ("ann", 12, 12, "region")
    _, page = call.get("items", page=1, size=5)
    assert (page["total"], page["page"], len(page["items"])) == (12, 1, 5)
    item = page["items"][0]
    assert item["rank"] == 6
    ((x0, y0, x1, y1),) = item["parts_l0"]  # the disc, whose margin the region has around it
    around = [max(0, x0 - 10), max(0, y0 - 10), min(900, x1 + 10), min(700, y1 + 10)]
    assert item["box_l0"] == pytest.approx(around, abs=1)
    status, crop = call.get("crop", id=item["id"], fov_um=64)
    assert (status, call.headers["content-type"]) == (200, "image/jpeg")
    assert picture(crop).shape == (128, 128, 3)
    assert picture(crop)[60:68, 60:68].mean() < 100  # the disc is in the middle
    said = {"id": item["id"], "decision": "accept", "label": None, "note": "sure"}
    _, told = call.post("decide", said)
    (line,) = (json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines())
    assert (line["region"], line["decision"], line["note"]) == (item["id"], "accept", "sure")
    over = {"event_id": line["event_id"]}
    assert (told["left"], told["item"]["decided"]) == (
        11, over | {"decision": "accept", "label": None, "note": "sure"})  # fmt: skip
    assert call.post("decide", {**said, "decision": "reject", "over": line["event_id"]})[1]["left"] == 11
    _, told = call.post("undo", {})
    assert (told["left"], told["item"]["decided"]["decision"], told["undone"]["decision"]) == (11, "accept", "reject")
    _, told = call.post("undo", {})
    assert (told["left"], told["item"]["id"], told["item"]["decided"]) == (12, item["id"], None)
    assert call.post("undo", {}) == (200, {"left": 12, "item": None})


def test_many_at_once(call: Caller, desk: Desk, case: Path) -> None:
    """Two windows decide side by side: every decision is in the log, and what is left is right."""
    ids = [item["id"] for item in desk.answer("items", {"page": 0, "size": 100})["items"]]
    failed: list[object] = []

    def decide(mine: list[str]) -> None:
        window = Caller(call.url)
        for id_ in mine:
            status, _ = window.post("decide", {"id": id_, "decision": "accept"})
            tile, _ = window.get("tile", slide=0, level=10, x=0, y=0)
            if (status, tile) != (200, 200):
                failed.append((status, tile))

    threads = [threading.Thread(target=decide, args=(ids[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len((case / "decisions.jsonl").read_text().splitlines()) == 12
    assert desk.answer("state", {})["left"] == 0


def test_an_end_waits_for_no_picture_and_says_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """As by Ctrl-C while a slide far away is read."""
    begun, go = threading.Event(), threading.Event()

    def slow(_: Any) -> dict[str, Any]:
        begun.set()
        assert go.wait(60)
        return {}

    desk._kinds = {**desk._kinds, "heat": slow}

    def ask(url: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # there is no answer
            Caller(url).get("heat", slide=0)

    with running(desk) as server:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        assert begun.wait(30)
    go.set()
    asking.join(30)
    assert capsys.readouterr().err == ""


def test_hostile_names_stay_data(case: Path, slide: Slide) -> None:
    name = "</script><img src=x onerror=alert(1)>"
    of_case = Case(ss.load_result(case), "region", slide_id=name, group=name)
    of_case.read_from(slide)
    with running(Desk(Review([of_case], list(of_case.items.values()), reviewer="ann", blinded=False))) as server:
        call = Caller(server.url)
        _, page = call.get("items", page=0, size=1)
        assert page["items"][0]["slide_name"] == name
        assert call.headers["content-type"] == "application/json"


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["slidescan", "review", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_it_runs_and_ends(self, tmp_path: Path) -> None:
        """An archive's command prints one URL that works, and Ctrl-C ends it with 0."""
        write_slide(tmp_path / "a.tiff", 1)
        (tmp_path / "slides.csv").write_text("slide_path\na.tiff\n")
        ss.scan_archive(read_listing(tmp_path / "slides.csv"), ORACLE, out=tmp_path / "runs", config=APART, workers=1)
        command = [sys.executable, "-m", "slidescan.cli", "review", "runs", "--slides", "slides.csv", "--top", "2"]
        with subprocess.Popen(
            [*command, "--reviewer", "ann"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            said = process.stdout.readline()
            url = process.stdout.readline()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#([\w-]{43})\n", url)
            assert found, (said, url, process.stderr.read() if process.poll() is not None else "")
            assert said == "2 regions to review, 2 left for ann; Ctrl-C ends\n"
            _, page = Caller(url.strip()).get("items", page=0, size=9)
            assert [item["slide_name"] for item in page["items"]] == ["a", "a"]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        assert out == "2 left; decisions are in decisions.jsonl beside each result\n"

    def test_what_is_wrong_is_one_line(
        self, case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for arguments, code, words in (
            ([str(tmp_path / "none")], 3, "none"),
            ([str(case), "--of", "cells"], 2, "'cells' is not one of 'regions', 'detections'"),
            ([str(case), "--reviewer", ""], 2, "reviewer: expected a name"),
            ([str(case), "--port", "99999"], 2, "--port"),
        ):
            assert self.run(monkeypatch, *arguments) == code
            err = capsys.readouterr().err
            assert words in err
            assert err.count("\n") == 1

    @pytest.mark.parametrize("package", ["starlette", "uvicorn"])
    def test_without_the_extra(
        self, case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
    ) -> None:
        for name in [
            name for name in sys.modules if name.split(".")[0] == package or name == "slidescan.reviews.server"
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        assert self.run(monkeypatch, str(case)) == 2
        assert 'pip install "slidescan[review]"' in capsys.readouterr().err
