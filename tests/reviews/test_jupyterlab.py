"""The review in a notebook of a real JupyterLab."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import slidescan as ss
from tests import jupyterlab
from tests.archives import write_slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import ORACLE
from tests.reviewed import APART

N = 12
CELLS = "document.querySelectorAll('.jp-Cell').length"
VIEW = "document.querySelectorAll('.slidescan-review')[{}]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of a slide, its result and a notebook."""
    folder = tmp_path / "notebooks"
    write_slide(folder / "slide.tiff", 3)
    ss.scan(folder / "slide.tiff", ORACLE, out=folder / "case", config=APART)
    begin = f"import os, sys\nsys.path.insert(0, {str(Path(ss.__file__).parents[1])!r})\nimport slidescan as ss\n"
    begin += "open('pid', 'w').write(str(os.getpid()))\n"
    begin += "looked = ss.review(ss.load_result('case'), slides='slide.tiff', reviewer='ann')\nlooked"
    jupyterlab.write_notebook(folder / "review.ipynb", begin, "looked", "os._exit(1)")
    return folder


@pytest.fixture
def lab(folder: Path, tmp_path: Path) -> Iterator[tuple[Tab, str]]:
    private = tmp_path / "private"
    with jupyterlab.serving(folder, private) as url, Tab(private / "browser", size_wh=(1400, 1000)) as tab:
        yield tab, url.format("review.ipynb")


def shown(tab: Tab, url: str) -> None:
    """Open the notebook, whose first cell has the focus when its kernel is there."""
    tab.open(url)
    tab.wait("!!document.querySelector('.jp-Notebook .jp-Cell .cm-content')")
    tab.click(".jp-Notebook .jp-Cell .cm-content")
    tab.wait("!!document.getElementById('jp-main-statusbar')?.innerText.includes('| Idle')")


def at(tab: Tab, n: int, view: int = 0) -> None:
    root = VIEW.format(view)
    tab.wait(
        f"!!({root}?.review?.panel?.seen && !{root}.review.busy"
        f" && {root}.querySelector('.ss-panel h2').textContent === '{n} of {N}')"
    )


def decided(folder: Path) -> list[str]:
    log = folder / "case" / "decisions.jsonl"
    return [json.loads(line)["decision"] for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
@pytest.mark.skipif(not jupyterlab.HERE, reason=jupyterlab.WHY)
def test_in_jupyterlab(lab: tuple[Tab, str], folder: Path) -> None:
    """Keys decide, and are the notebook's where it has the focus; neither a reload nor a dead kernel costs anything."""
    tab, url = lab
    shown(tab, url)
    tab.press("Enter", shift=True)
    at(tab, 1)
    tab.press("b")  # a cell has the focus: the key is the notebook's, and in it makes a cell below
    tab.wait(f"{CELLS} === 4")
    assert not tab.run(f"{VIEW.format(0)}.classList.contains('ss-no-boxes')")

    tab.click(".ss-card[aria-current]")
    for n, key in enumerate("aru", 1):
        at(tab, n)
        tab.press(key)
    at(tab, 4)
    assert decided(folder) == ["accept", "reject", "unsure"]
    sidebar = "document.getElementById('jp-left-stack').checkVisibility()"
    seen = tab.run(sidebar)
    tab.press("b", control=True)  # shows or hides it wherever the focus is, save in the review
    assert tab.run(sidebar) == seen
    tab.click(".slidescan-review footer")  # beside everything
    assert tab.run(f"document.activeElement === {VIEW.format(0)}")
    tab.press("n")
    for key in "xz":
        tab.press(key)
    assert tab.run("document.activeElement.value") == "xz"
    tab.press("Escape")
    tab.press("?")
    tab.wait("document.querySelector('.ss-help').open")
    tab.press("d")
    tab.press("d")
    tab.press("Escape")
    tab.wait("!document.querySelector('.ss-help').open")

    tab.press("f")
    context = f"{VIEW.format(0)}.review.context"
    tab.wait(f"!!({context}.root.dataset.layers && {context}.image?.getFullyLoaded())")
    left = tab.run(f"{context}.view().left")
    tab.press("ArrowRight", shift=True)
    tab.wait(f"{context}.view().left < {left - 20}")
    tab.press("f")
    assert tab.run(CELLS) == 4
    assert tab.run("typeof OpenSeadragon") == "undefined"

    tab.press("s", control=True)
    tab.wait("!document.querySelector('.jp-mod-dirty')")
    saved = nbformat.read(folder / "review.ipynb", as_version=4)
    (output,) = saved.cells[0].outputs
    assert set(output.data) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    assert len(json.dumps(saved)) < 10_000  # bytes: with a picture or the page's code it would be far more
    assert "widgets" not in saved.metadata

    shown(tab, url)
    at(tab, 4)  # the kernel is the same, and so is the widget
    tab.run(f"window.before = {VIEW.format(0)}; null")
    tab.press("Enter", shift=True)
    tab.wait(f"!!{VIEW.format(0)} && {VIEW.format(0)} !== window.before")
    at(tab, 4)
    assert len(decided(folder)) == 3


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
@pytest.mark.skipif(not jupyterlab.HERE, reason=jupyterlab.WHY)
def test_two_views_and_a_kernel_that_dies(lab: tuple[Tab, str], folder: Path) -> None:
    """Each view has its own answers; what a dead kernel did not save is said to be not saved."""
    tab, url = lab
    shown(tab, url)
    tab.press("Enter", shift=True)
    at(tab, 1)
    tab.press("Enter", shift=True)
    at(tab, 1, 1)
    tab.run(f"{VIEW.format(1)}.querySelectorAll('.ss-card')[2].click(); null")
    at(tab, 3, 1)
    tab.run(f"{VIEW.format(1)}.querySelectorAll('.ss-card')[2].focus(); null")
    tab.press("r")
    at(tab, 4, 1)
    at(tab, 1)
    assert decided(folder) == ["reject"]

    kernel = int((folder / "pid").read_text())
    os.kill(kernel, signal.SIGSTOP)  # as busy as can be
    try:
        tab.press("u")
        tab.wait(
            "[...document.querySelectorAll('.ss-kernel')].filter((e) => e.textContent.includes('busy')).length === 1"
        )
        tab.press("u")  # one at a time
        assert decided(folder) == ["reject"]
    finally:
        os.kill(kernel, signal.SIGCONT)
    at(tab, 5, 1)
    assert tab.run("document.querySelectorAll('.ss-kernel:not(:empty)').length") == 0
    assert decided(folder) == ["reject", "unsure"]

    tab.click(".jp-Cell:last-of-type .cm-content")
    tab.press("Enter", shift=True)
    ended = "[...document.querySelectorAll('.ss-kernel')].every((e) => e.textContent.includes('run the cell again'))"
    tab.wait(ended)
    tab.wait("!!document.querySelector('.jp-Dialog .jp-mod-accept')")  # the notebook says so, too
    tab.click(".jp-Dialog .jp-mod-accept")
    tab.wait("!document.querySelector('.jp-Dialog')")
    tab.run(f"{VIEW.format(1)}.querySelector('.ss-card[aria-current]').focus(); null")
    tab.press("a")
    alert = f"{VIEW.format(1)}.querySelector('[role=alert]').textContent"
    tab.wait(f"{alert}.startsWith('Not saved: The kernel')")
    assert decided(folder) == ["reject", "unsure"]
