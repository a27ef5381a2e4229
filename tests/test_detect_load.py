"""Finding a detector: what is a model, what is not, and what it is called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from slidescan.detect import Family, load_detector
from slidescan.errors import ModelError
from tests.tiny import noise


@pytest.mark.parametrize(
    "change",
    [
        *({"mpp": 0}, {"mpp": "x"}, {"mpp": "0.25"}, {"mpp": True}, {"object_um": "15"}, {"halo_um": "5"}),
        *({"input_px": 100}, {"input_px": 640.0}, {"threshold": 2}, {"temperature": "1.0"}, {"anchor_px": -4}),
        *(
            {"classes": 3},
            {"training": None},
            {"name": None},
            {"name": 5},
            {"name": "a\n"},
            {"attributes": [3]},
            {"attributes": ["score"]},
            {"attributes": ["a", "a"]},
        ),
        *({"attribute_cuts": [2.0]}, {"attribute_cuts": ["x"]}, {"attribute_cuts": [0.5]}),
    ],
)
def test_a_wrong_card_is_refused(copied: Path, change: dict[str, object]) -> None:
    """What is out of range or of another type in slidescan.json is found before a scan starts."""
    card = copied / "slidescan.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    with pytest.raises(ModelError, match=r"slidescan\.json"):
        load_detector(copied)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/directory", "../mitosis", "a/b/c", ""])
def test_an_unknown_name_is_refused_without_the_network(name: str) -> None:
    """What is neither a directory, nor bundled, nor of the form owner/name raises at once."""
    with pytest.raises(ModelError):
        load_detector(name)


def test_an_empty_directory_and_a_missing_device_are_refused(tmp_path: Path, tiny: Path) -> None:
    """Both errors say what was expected."""
    with pytest.raises(ModelError, match="found neither"):
        load_detector(tmp_path)
    with pytest.raises(ModelError, match="device"):
        load_detector(tiny, device="cuda:99").detect(noise(1, 64, 64), 0.0)
    with pytest.raises(ModelError, match="precision"):
        load_detector(tiny, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="model: expected a name or a directory, got int"):
        load_detector(5)  # type: ignore[arg-type]
    assert load_detector(tiny, mpp=np.float32(0.25)).mpp == load_detector(tiny).mpp
    for mpp in ("0.25", 0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ModelError, match="mpp: expected µm/px above 0, or px, got"):
            load_detector(tiny, mpp=mpp)  # type: ignore[arg-type]


class _LibrarysOwnError(Exception):
    """Of an HTTP library: it derives from nothing that is known here."""


@pytest.mark.parametrize("error", [_LibrarysOwnError("403"), OSError("no route"), ValueError("no such repository")])
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whichever library asks it, a proxy that refuses and a server that hangs up are no tracebacks."""

    def fetch(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=r"acme/detr: .*cannot fetch it .*; check the name and the connection"):
        load_detector("acme/detr", mpp=1.0)


def test_a_model_of_the_hub_has_its_name(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of a snapshot, which is a hash: in results and in errors."""
    snapshot = tmp_path / "models--acme--detr" / "snapshots" / "0123456789abcdef"
    shutil.copytree(copied, snapshot)
    (snapshot / "slidescan.json").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert load_detector("acme/detr", mpp=0.25).name == "acme/detr"
    with pytest.raises(ModelError, match=r"^acme/detr: expected slidescan\.json"):
        load_detector("acme/detr")


def test_a_family_has_the_name_of_its_directory(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one is in it."""
    (copied.parent / "family").mkdir()
    shutil.move(copied, copied.parent / "family" / "0.5")
    monkeypatch.chdir(copied.parent / "family")
    found = load_detector(".")
    assert isinstance(found, Family)
    assert found.title == "family"


def test_what_cannot_be_looked_into(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no file system takes is one line; a directory of root's beside the variants is none of them."""
    with pytest.raises(ModelError, match="cannot read it"):
        load_detector("x" * 5000)
    (copied.parent / "family").mkdir()
    shutil.move(copied, copied.parent / "family" / "0.5")
    closed = copied.parent / "family" / "lost+found"
    closed.mkdir()
    access, is_file = os.access, Path.is_file

    def looked(path: Path) -> bool:
        if closed in path.parents:
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    monkeypatch.setattr(Path, "is_file", looked)
    assert load_detector(copied.parent / "family").name == "tiny"
