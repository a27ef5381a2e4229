"""The report of an archive: it says what the records say, nothing breaks out of it, and a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import slidescan as ss
from slidescan.archive import report
from slidescan.archive.record import REASONS, Record
from slidescan.archive.report import write_report
from slidescan.archive.unfinished import UNFINISHED, begin
from tests.archives import write_slide
from tests.discs import ORACLE, config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;{{style}}{{data}}",
    "\"quotes\" 'and' `ticks` ${1}",
    "\u202egpj.evil",
    "שלום",
    "a\u2028b\u2029c\0d",
    "\udcff",  # of a file name that is no UTF-8
    "../../up",
    "x" * 300,
]
TOLD: dict[str, Any] = {
    "found": 12,
    "detections": 30,
    "flagged_regions": 3,
    "tissue_mm2": 40.5,
    "analysed_fraction": 1.0,
    "hotspot_count": 5,
    "best_evidence": 9.25,
    "scores": [9, 5, 1, *[0] * 16, 2],
    "tiles": 90,
    "read_failed_boxes": 0,
    "saturated_tiles": 0,
    "crashed_regions": 0,
    "megapixels": 100.0,
    "seconds": 12.5,
    "stages_s": {"decode": 3.0, "model": 9.0, "write": 0.5},
    "peak_rss_mb": 1200,
    "peak_gpu_mb": None,
    "detector": "mitosis",
}


def done(slide_id: str, reason: str | None = None, **told: Any) -> Record:
    return Record(slide_id, "north", "key", "done", reason, "", 1, 1_700_000_000.0, told={**TOLD, **told})


def failed(slide_id: str, reason: str = "open_error", message: str = "it is broken") -> Record:
    return Record(slide_id, "south", "key", "failed", reason, message, 1, 1_700_000_000.0)


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"style": [], "script": []}
        self.text = ""
        self.at = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.at = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.at = ""

    def handle_data(self, data: str) -> None:
        if self.at in self.inside:
            self.inside[self.at][-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.inside["script"][0], parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))

    @property
    def rows(self) -> list[dict[str, Any]]:
        data = self.data
        return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def written(out: Path, *records: Record) -> Page:
    write_report(out, records)
    return Page((out / "report.html").read_bytes().decode("utf-8"))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result directory."""
    folder = tmp_path_factory.mktemp("report")
    write_slide(folder / "case.tiff", 1)
    ss.scan(ss.open_slide(folder / "case.tiff"), ORACLE, out=folder / "case", config=config())
    return folder / "case"


def give(out: Path, slide_id: str, scanned: Path) -> Path:
    """Give a slide the pictures of a scanned one."""
    folder = out / "slides" / slide_id
    folder.mkdir(parents=True)
    for name in ("overview.png", "manifest.json"):
        shutil.copy(scanned / name, folder / name)
    return folder


class TestData:
    def test_it_is_what_the_records_say(self, tmp_path: Path) -> None:
        told = {**TOLD, "analysed_fraction": 0.5, "peak_gpu_mb": 7000}
        (row,) = written(tmp_path, done("a", "decode_holes", **told)).rows
        for name in ("tissue_mm2", "found", "flagged_regions", "best_evidence", "seconds", "peak_gpu_mb"):
            assert row[name] == told[name]
        assert (row["slide_id"], row["group"], row["state"], row["reason"]) == ("a", "north", "done", "decode_holes")
        assert row["per_mm2"] == pytest.approx(12 / (40.5 * 0.5), abs=1e-4)
        assert row["stages_s"] == [3.0, 9.0, 0.5]

    @given(
        st.lists(
            st.builds(
                Record,
                slide_id=st.sampled_from(HOSTILE) | st.text(min_size=1),
                group=st.sampled_from(HOSTILE) | st.text(),
                key=st.just("k"),
                state=st.sampled_from(["done", "failed"]),
                reason=st.sampled_from([None, *REASONS, "of_tomorrow", *HOSTILE]),
                message=st.sampled_from(HOSTILE) | st.text(),
                told=st.dictionaries(
                    st.sampled_from(sorted(TOLD)),
                    st.none()
                    | st.floats()
                    | st.sampled_from(HOSTILE)
                    | st.booleans()
                    | st.lists(st.floats(), min_size=20, max_size=20)
                    | st.dictionaries(st.sampled_from(HOSTILE), st.floats()),
                ),
            ),
            max_size=4,
            unique_by=lambda record: record.slide_id,
        )
    )
    def test_whatever_they_hold(self, tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
        """Text comes back as it was, nothing of it becomes a tag, numbers are numbers or null."""
        out = tmp_path_factory.getbasetemp() / "whatever"
        out.mkdir(exist_ok=True)
        page, plain = written(out, *records), written(out)
        assert {row["slide_id"]: row["message"] for row in page.rows} == {r.slide_id: r.message for r in records}
        allowed = {"section", "h2", "table", "thead", "tbody", "tr", "th", "td", "p", "code", "div", "dt", "dd"}
        allowed |= {"svg", "line", "text", "rect", "title", "details", "summary"}
        extra = [tag for tag in page.tags if tag not in plain.tags]
        assert {tag for tag, _ in extra} <= allowed | {"meta"}
        assert [t for t, _ in page.tags].count("script") == 2
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        for row in page.rows:
            for name in (*report._NUMBERS, "per_mm2"):
                assert row[name] is None or math.isfinite(row[name])

    def test_what_is_not_on_record_is_empty(self, tmp_path: Path) -> None:
        """An older record's missing numbers are null, and so is what is None, NaN or no number."""
        odd = dict.fromkeys(report._NUMBERS, math.nan) | {"stages_s": None, "scores": None, "megapixels": None}
        rows = written(tmp_path, Record("a", "", "k", "done"), done("b", **odd), done("c", found="12")).rows
        by_id = {row["slide_id"]: row for row in rows}
        for name in (*report._NUMBERS, "per_mm2", "stages_s", "picture"):
            assert by_id["a"][name] is None
            assert by_id["b"][name] is None
        assert by_id["c"]["found"] is None

    def test_worst_first(self, tmp_path: Path) -> None:
        records = [
            done("some", best_evidence=3.0),
            done("unknown", best_evidence=None),
            done("most", best_evidence=30.0),
            done("hole", "decode_holes", analysed_fraction=0.7, read_failed_boxes=4),
            done("crash", crashed_regions=1, analysed_fraction=0.9),
            done("full", saturated_tiles=2, best_evidence=99.0),
            done("blank", "no_tissue", analysed_fraction=None, best_evidence=0.0),
            failed("z", "killed"),
            failed("y", "open_error"),
        ]
        ids = [row["slide_id"] for row in written(tmp_path, *records).rows]
        assert ids == ["z", "y", "blank", "hole", "crash", "full", "most", "some", "unknown"]

    def test_ten_thousand(self, tmp_path: Path) -> None:
        records = [failed(f"case-{i:05d}") if i % 20 == 0 else done(f"case-{i:05d}", found=i) for i in range(10_000)]
        assert len(written(tmp_path, *records).rows) == 10_000
        assert (tmp_path / "report.html").stat().st_size < 4_000_000
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


class TestHead:
    def test_numbers(self, tmp_path: Path) -> None:
        (tmp_path / UNFINISHED).mkdir()
        begin(tmp_path, dict.fromkeys("abcdef", ""), "def", 1)
        page = written(tmp_path, done("a"), done("b", "decode_holes", analysed_fraction=0.99999), failed("c", "no_mpp"))
        said = " ".join(page.text.split())
        for part in ("6", "81.0 mm²", "99.99%", "Research use only", "Scores of all 34 detections", "Detector mitosis"):
            assert part in said
        for reason in ("no_mpp", "decode_holes"):
            assert REASONS[reason][1] in said
        assert "2023-11-14 22:13 UTC" in said
        assert "To do3" in said
        assert "killed before its end" in said
        bars = [attributes for tag, attributes in page.tags if tag == "rect"]
        assert len(bars) == 4  # of 20 bins those with something in them
        assert all(float(bar["height"] or 0) > 0 and float(bar["y"] or 0) >= report._TOP for bar in bars)

    def test_nothing_yet(self, tmp_path: Path) -> None:
        page = written(tmp_path)
        assert page.rows == []
        assert "Failures" not in page.text
        assert "svg" not in {tag for tag, _ in page.tags}


class TestPrivacy:
    def test_nothing_is_fetched_and_only_ours_runs(self, tmp_path: Path) -> None:
        page = written(tmp_path, done("a"), failed("b"))
        (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for source, text in (("style-src", page.inside["style"][0]), ("script-src", page.inside["script"][1])):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{source} 'sha256-{digest}'" in policy
        assert not [a for _, a in page.tags if {"src", "href", "style", "srcset", "action"} & set(a)]
        assert not re.search(
            rb"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b",
            (tmp_path / "report.html").read_bytes(),
        )

    def test_no_path(self, tmp_path: Path, scanned: Path) -> None:
        give(tmp_path, "a", scanned)
        written(tmp_path, done("a"), failed("b"))
        page = (tmp_path / "report.html").read_bytes()
        for path in (tmp_path, scanned, Path.cwd(), Path.home()):
            assert len(path.parts) == 2 or str(path).encode() not in page


class TestPictures:
    def test_small_ones_of_the_slides_that_matter(
        self, tmp_path: Path, scanned: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half for gaps, the others by evidence; none for a slide without; never more than the most."""
        monkeypatch.setattr(report, "_MOST_PICTURES", 4)
        gaps = [done(f"gap{i}", "decode_holes", analysed_fraction=0.1 * i) for i in range(4)]
        good = [done(f"good{i}", best_evidence=float(i)) for i in range(4)]
        for record in (*gaps, *good):
            give(tmp_path, record.slide_id, scanned)
        page = written(tmp_path, *good, *gaps, failed("lost"))
        assert {r["slide_id"] for r in page.rows if r["picture"]} == {"gap0", "gap1", "good3", "good2"}
        assert "density of figures and coverage: 4, at most" in page.text
        for row in page.rows:
            if row["picture"]:
                kind, _, data = row["picture"].partition(",")
                assert kind == "data:image/jpeg;base64"
                with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                    assert max(picture.size) == 160
        assert {r["slide_id"] for r in written(tmp_path, *gaps).rows if r["picture"]} == {f"gap{i}" for i in range(4)}

    @pytest.mark.parametrize(
        "damage", ["no picture", "no manifest", "cut", "flipped", "text", "other", "schema", "frame"]
    )
    def test_damaged(self, tmp_path: Path, scanned: Path, damage: str) -> None:
        folder = give(tmp_path, "a", scanned)
        picture, manifest = folder / "overview.png", folder / "manifest.json"
        data = picture.read_bytes()
        if damage == "no picture":
            picture.unlink()
        elif damage == "no manifest":
            manifest.unlink()
        elif damage == "cut":
            picture.write_bytes(data[: len(data) // 2])
        elif damage == "flipped":
            picture.write_bytes(data[:60] + bytes(255 - byte for byte in data[60:90]) + data[90:])
        elif damage == "text":
            picture.write_text("not a picture")
        elif damage == "other":
            Image.new("RGB", (90, 90)).save(picture)
        elif damage == "schema":
            manifest.write_text('{"schema": 99}')
        else:
            manifest.write_text('{"schema": 1, "frame": {"size_wh": [0, 0]}}')
        assert [row["picture"] for row in written(tmp_path, done("a")).rows] == [None]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to see what a browser makes of the page")
class TestBrowser:
    def shown(self, page: Path, script: str = "") -> tuple[Page, str]:
        """Open a page, run a script in a copy of it that permits one, and return what is in the document then."""
        assert CHROMIUM is not None
        if script:
            text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
            page = page.with_name("driven.html")
            page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command += [f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return Page(done.stdout), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    def ids(self, page: Page) -> list[str]:
        """Return the names in the table's rows."""
        return re.findall(r"\[(\w+)\]", page.text)

    def test_it_shows(self, tmp_path: Path, scanned: Path) -> None:
        """The policy lets the page run as it is; a page of rows is there; hostile text is text."""
        give(tmp_path, "[pic]", scanned)
        records = [done(f"[n{i}]") for i in range(300)]
        records += [failed(text, message=text) for text in HOSTILE if text != "\udcff"]  # which --dump-dom dies of
        write_report(tmp_path, [*records, done("[pic]", "decode_holes")])
        page, console = self.shown(tmp_path / "report.html")
        assert console == ""
        tags = [tag for tag, _ in page.tags]
        assert "interactive" in [a.get("id") for _, a in page.tags if "hidden" not in a]
        assert tags.count("tr") >= 100
        assert "1–100 of 310" in page.text
        assert [a["src"][:23] for tag, a in page.tags if tag == "img" and a["src"]] == ["data:image/jpeg;base64,"]
        assert HOSTILE[0] in page.text
        links = [a["href"] for tag, a in page.tags if tag == "a"]
        assert "slides/%5Bpic%5D/overview.png" in links
        assert all((link or "").startswith("slides/") for link in links)

    def test_sort_filter_and_pages(self, tmp_path: Path) -> None:
        told = [("a", 5, 1.0), ("b", 50, 9.0), ("c", None, 4.0), ("d", 7, 0.5)]
        write_report(
            tmp_path, [done(f"[{i}]", found=n, best_evidence=e) for i, n, e in told] + [failed("[x]", "killed")]
        )
        press = "document.querySelector('[data-column=found] button').click();"
        choose = "const c = document.getElementById('{}'); c.value = '{}'; c.dispatchEvent(new Event('{}'));"
        for script, ids, sort in (
            ("0", ["x", "b", "c", "a", "d"], None),
            (press, ["b", "d", "a", "x", "c"], "descending"),  # what is not on record comes last
            (press * 2, ["a", "d", "b", "x", "c"], "ascending"),
            (press * 3, ["x", "b", "c", "a", "d"], None),
            (choose.format("find", "KILLED sou", "input"), ["x"], None),
            (choose.format("state", "done", "change"), ["b", "c", "a", "d"], None),
            (choose.format("reason", "killed", "change"), ["x"], None),
        ):
            page, console = self.shown(tmp_path / "report.html", script)
            assert console == ""
            assert self.ids(page) == ids
            sorts = [a["aria-sort"] for _, a in page.tags if a.get("data-column") == "found"]
            assert sorts == [sort or "none"]

    def test_ten_thousand(self, tmp_path: Path) -> None:
        """All are counted, a page of them is in the document, and the last page ends with the last."""
        write_report(tmp_path, [done(f"[n{i}]", best_evidence=10_000.0 - i) for i in range(10_000)])
        page, _ = self.shown(tmp_path / "report.html", "document.querySelector('[data-page=last]').click();")
        assert "9,901–10,000 of 10,000" in page.text
        assert self.ids(page) == [f"n{i}" for i in range(9_900, 10_000)]
