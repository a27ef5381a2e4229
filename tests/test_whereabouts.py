"""Reviews and trainings find the slides of a result again, which names no path itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan import cli
from slidescan.errors import ConfigError
from slidescan.slides import Slide, memory_slide
from slidescan.slides.remote import Remote
from slidescan.train.decided import load_decided
from slidescan.whereabouts import noted, recalled
from tests.archives import write_slide
from tests.decided.saying import SETTINGS, decide
from tests.discs import MPP, ORACLE, discs
from tests.reviewed import APART


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the directory of notes, which is not there yet; the working directory is another one."""
    monkeypatch.setenv("SLIDESCAN_STATE", str(tmp_path / "state"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "state"


def scan(tmp_path: Path, **options: bool) -> Path:
    """Scan the slide ``Doe^Jane/a.tiff`` and return the result directory."""
    write_slide(tmp_path / "Doe^Jane" / "a.tiff", 1)
    ss.scan(tmp_path / "Doe^Jane" / "a.tiff", ORACLE, out=tmp_path / "runs" / "case", config=APART, **options)
    return tmp_path / "runs" / "case"


def crop(what: ss.ScanResult | ss.Archive, slides: object = None) -> np.ndarray:
    looked = ss.review(what, reviewer="ann", slides=slides)  # type: ignore[arg-type]
    return looked.crop(looked.next().id)  # type: ignore[union-attr]


def test_a_review_finds_the_slide(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path the result is named, as if the slide had been given; the result itself does not know."""
    case = scan(tmp_path)
    expected = crop(ss.load_result(case), tmp_path / "Doe^Jane" / "a.tiff")
    assert (crop(ss.load_result(case)) == expected).all()
    monkeypatch.chdir(tmp_path)
    assert (crop(ss.load_result("runs/case")) == expected).all()
    monkeypatch.chdir(case)
    assert (crop(ss.load_result(".")) == expected).all()
    (tmp_path / "link").symlink_to(case)
    assert (crop(ss.load_result(tmp_path / "link")) == expected).all()
    assert not any(b"Jane" in file.read_bytes() for file in case.rglob("*") if file.is_file())


def test_a_note_is_nobody_elses(state: Path, tmp_path: Path) -> None:
    """Only the user may read it; scanning again adds nothing."""
    case = scan(tmp_path)
    (note,) = state.iterdir()
    assert (note.stat().st_mode & 0o777, state.stat().st_mode & 0o777) == (0o600, 0o700)
    out, slides = map(json.loads, note.read_text().splitlines())
    assert (out, slides) == (str(case), {"case": str(tmp_path / "Doe^Jane" / "a.tiff")})
    before = note.stat().st_mtime_ns
    assert scan(tmp_path) == case
    assert [each.stat().st_mtime_ns for each in state.iterdir()] == [before]


def test_a_slide_that_moved_has_to_be_named(state: Path, tmp_path: Path) -> None:
    """One that is gone was never known, another one in its place is refused; a new scan knows better."""
    case = scan(tmp_path)
    slide = tmp_path / "Doe^Jane" / "a.tiff"
    slide.rename(tmp_path / "b.tiff")
    with pytest.raises(ConfigError, match="pass slides="):
        crop(ss.load_result(case))
    assert len(crop(ss.load_result(case), tmp_path / "b.tiff"))
    write_slide(slide, 2)
    with pytest.raises(ConfigError, match=r"got one of other content"):
        crop(ss.load_result(case))
    ss.scan(tmp_path / "b.tiff", ORACLE, out=case, config=APART)  # done already; but now it is known where
    assert len(crop(ss.load_result(case)))


def test_an_archive_finds_its_slides(state: Path, tmp_path: Path) -> None:
    """All of them in one note, also for one result of it, and those of an earlier list."""
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(tmp_path / "in" / f"{name}.tiff", seed)
        (tmp_path / f"{name}.csv").write_text(f"slide_path,slide_id\nin/{name}.tiff,{name}-1\n")
        ss.scan_archive(tmp_path / f"{name}.csv", ORACLE, out=tmp_path / "runs", config=APART, workers=1)
    assert len(list(state.iterdir())) == 1
    archive = ss.open_archive(tmp_path / "runs")
    at = {name: tmp_path / "in" / f"{name[0]}.tiff" for name in ("a-1", "b-1")}
    for looked, given in (
        (ss.review(archive, reviewer="ann"), ss.review(archive, reviewer="ann", slides=at)),
        (ss.review(archive.top(9), reviewer="ann"), ss.review(archive.top(9), reviewer="ann", slides=at)),
    ):
        assert {item.slide_id for item in looked.items()} == {"a-1", "b-1"}
        for item in looked.items():
            assert (looked.crop(item.id) == given.crop(item.id)).all()
    assert len(crop(archive.result("b-1")))


def test_what_was_decided_is_learned_without_naming_the_slide(state: Path, tmp_path: Path) -> None:
    """`train --add-decisions` finds it as a review does."""
    case = scan(tmp_path)
    decide(case, "accept")
    assert load_decided(case, None, SETTINGS).accepted == 1
    shutil.rmtree(tmp_path / "Doe^Jane")
    with pytest.raises(ConfigError, match="expected where the pixels of 'case' are"):
        load_decided(case, None, SETTINGS)


def test_nothing_is_noted_where_that_is_not_wanted(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slide_in_memory: Slide
) -> None:
    """By the call, by the environment, of slides in memory and where nothing is kept."""
    case = scan(tmp_path, remember=False)
    ss.scan(tmp_path / "Doe^Jane" / "a.tiff", ORACLE, config=APART)
    ss.scan(slide_in_memory, ORACLE, out=tmp_path / "memory", config=APART)
    assert not state.exists()
    assert recalled([case, tmp_path / "memory"]) == {}
    monkeypatch.setenv("SLIDESCAN_STATE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scan(tmp_path)
    assert not (tmp_path / "home").exists()


@pytest.fixture
def slide_in_memory() -> Slide:
    return discs(n=12, size_wh=(900, 700))[0]


def test_the_users_state_directory_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    """`$XDG_STATE_HOME`, else ``~/.local/state``."""
    monkeypatch.delenv("SLIDESCAN_STATE")
    for variable, folder in (("HOME", "h/.local/state"), ("XDG_STATE_HOME", "x")):
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / folder.split("/", maxsplit=1)[0]))
        noted(tmp_path / "runs", {"runs": tmp_path})
        assert len(list((tmp_path / folder / "slidescan").iterdir())) == 1
        assert recalled([tmp_path / "runs"]) == {tmp_path / "runs": str(tmp_path)}


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"\n5', '"x"\n{"case": null}', "\xff"])
def test_a_spoilt_note_is_none(state: Path, tmp_path: Path, text: str) -> None:
    """It is read as nothing, and written anew by the next scan."""
    case = scan(tmp_path)
    (note,) = state.iterdir()
    note.write_text(text, encoding="latin-1")
    assert recalled([case]) == {}
    scan(tmp_path)
    assert recalled([case]) == {case: str(tmp_path / "Doe^Jane" / "a.tiff")}


def test_a_note_ends_with_its_output(state: Path, tmp_path: Path) -> None:
    """What was noted of a directory that is gone is forgotten when another one is noted."""
    case = scan(tmp_path)
    (spoilt := state / "spoilt.json").write_text("{")
    noted(tmp_path / "other", {"other": tmp_path})
    assert len(list(state.iterdir())) == 3
    shutil.rmtree(case)
    noted(tmp_path / "another", {"another": tmp_path})
    assert len(list(state.iterdir())) == 2  # "other" never was
    assert spoilt.exists()


def test_an_output_used_again_is_noted_anew(state: Path, tmp_path: Path, slide_in_memory: Slide) -> None:
    """Also where its slide is nowhere now, or one in memory that is called like a file."""
    case = scan(tmp_path)
    (Path("case.tiff")).write_bytes(b"")
    ss.scan(slide_in_memory, ORACLE, out=case, config=APART, overwrite=True)
    assert recalled([case]) == {}
    named = memory_slide(slide_in_memory.read(0, 0, 900, 700, slide_in_memory.frame).rgb, MPP, name="case.tiff")
    ss.scan(named, ORACLE, out=tmp_path / "named", config=APART)
    assert recalled([tmp_path / "named"]) == {}


@pytest.mark.parametrize("name", ["x" * 300, "closed/a.tiff"])
def test_a_place_that_cannot_be_looked_at_costs_nothing(
    state: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive's other slides are scanned and reviewed."""
    monkeypatch.setattr("slidescan.archive.engine._BACKOFF_S", 0.01)
    write_slide(tmp_path / "b.tiff", 2)
    (tmp_path / "closed").mkdir(mode=0o000)
    (tmp_path / "slides.csv").write_text(f"slide_path,slide_id\n{name},a\nb.tiff,b\n")
    records = ss.scan_archive(tmp_path / "slides.csv", ORACLE, out=tmp_path / "runs", config=APART, workers=1)
    assert [record.state for record in records] == ["failed", "done"]
    assert recalled(tmp_path / "runs" / "slides" / slide_id for slide_id in "ab").keys() == {
        tmp_path / "runs" / "slides" / "b"
    }


def test_a_state_directory_that_cannot_be_written_costs_nothing(
    state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The scan is done, and says nothing of it."""
    state.write_text("a file")
    case = scan(tmp_path)
    assert (case / "manifest.json").is_file()
    assert recalled([case]) == {}
    assert capfd.readouterr().err == ""


def test_urls_are_noted_but_for_secrets(state: Path, tmp_path: Path) -> None:
    """A token or a password stays nowhere."""
    places = {
        "plain": "https://archive.example/plain.svs",
        "signed": "https://archive.example/signed.svs?token=secret",
        "login": "https://ann:secret@archive.example/login.svs",
        "chained": "simplecache::https://ann:secret@archive.example/chained.svs",
    }
    noted(tmp_path / "runs", {**places, "remote": Remote("s3://bucket/remote.svs")})
    (note,) = state.iterdir()
    assert "secret" not in note.read_text()
    results = [tmp_path / "runs" / "slides" / name for name in (*places, "remote")]
    assert recalled(results) == {results[0]: places["plain"], results[4]: "s3://bucket/remote.svs"}


class TestCommand:
    def told(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        from slidescan.reviews.server import ReviewServer

        monkeypatch.setattr(ReviewServer, "run", lambda self: self._socket.close())
        monkeypatch.setattr(sys, "argv", ["slidescan", "review", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_it_says_what_cannot_be_seen(
        self, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Nothing where the slide is known, a line where it is not, an error at once where it is another."""
        case = scan(tmp_path)
        assert self.told(monkeypatch, case) == 0
        assert capsys.readouterr().err == ""
        os.rename(tmp_path / "Doe^Jane", tmp_path / "moved")  # noqa: PTH104  # a folder
        assert self.told(monkeypatch, case) == 0
        assert capsys.readouterr().err == "no pixels to see: --slides says where they are\n"
        write_slide(tmp_path / "Doe^Jane" / "a.tiff", 2)  # another one lies there now
        assert self.told(monkeypatch, case) == 0
        assert capsys.readouterr().err == "no pixels to see: --slides says where they are\n"
        write_slide(tmp_path / "other.tiff", 2)
        for slides, code, said in (
            (tmp_path / "other.tiff", 2, r"slides: 'case': .*got one of other content"),
            (tmp_path / "nowhere.tiff", 1, r"nowhere\.tiff"),
        ):
            assert self.told(monkeypatch, case, "--slides", slides) == code
            out, err = capsys.readouterr()
            assert re.fullmatch(rf"slidescan: .*{said}.*\n", err), err
            assert out == ""

    def test_of_an_archive(
        self, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """How many slides are lost, and a list that has none of them."""
        for seed, name in enumerate("ab"):
            write_slide(tmp_path / "in" / f"{name}.tiff", seed)
        ss.scan_archive(tmp_path / "in", ORACLE, out=tmp_path / "runs", config=APART, workers=1)
        (tmp_path / "in" / "b.tiff").rename(tmp_path / "c.tiff")
        assert self.told(monkeypatch, tmp_path / "runs") == 0
        assert capsys.readouterr().err == "no pixels of 1 of 2 slides to see: --slides says where they are\n"
        (tmp_path / "other").mkdir()
        (tmp_path / "c.tiff").rename(tmp_path / "other" / "c.tiff")
        assert self.told(monkeypatch, tmp_path / "runs", "--slides", tmp_path / "other") == 2
        assert capsys.readouterr().err == (
            "slidescan: slides: expected 'a' or another that was scanned, got none of them\n"
        )
