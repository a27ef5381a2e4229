"""YOLO through ultralytics: the same boxes as its own, a directory that runs nothing, and a package asked for by name.

What needs the package is skipped where it is not installed: it is AGPL-3.0 and not part of the test extra.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

import slidescan as ss
from slidescan.detect import Family, Model, convert_yolo, load_detector
from slidescan.detections import Detections, Detector
from slidescan.errors import MissingExtraError, ModelError
from tests.families import picture
from tests.test_cli import slidescan
from tests.test_detect_families import assert_same
from tests.test_detect_image import assert_equal, scored_whole
from tests.yolos import END2END, NEEDS_ULTRALYTICS, Bomb, converted, trained


def described(directory: Path, **changes: Any) -> Path:
    """A directory whose description is the least there is, with these changes; its weights are none."""
    table = {"nc": 1, "end2end": True, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    (directory / "model.yaml").write_text(yaml.safe_dump(table | changes))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def test_nothing_else_imports_the_package() -> None:
    """Neither importing slidescan and its names, nor loading, running and listing other detectors."""
    code = """
import sys
import numpy as np
import slidescan as ss
import slidescan.cli, slidescan.detect.yolo, slidescan.detect.network
for name in ss.__all__:
    getattr(ss, name)
ss.detect_image(np.zeros((128, 128, 3), np.uint8), ss.load_detector("mitosis"))
assert not [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_directory_does_not_ask_for_it(tmp_path: Path) -> None:
    """The error says what to write, and under which licence the package is; so it does for a family."""
    family = tmp_path / "family"
    (family / "fine").mkdir(parents=True)
    for path in (described(family / "fine"), family):
        with pytest.raises(ModelError, match=rf"write ultralytics:{re.escape(str(path))} .*AGPL-3\.0"):
            load_detector(path)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any slide is read: when the detector is loaded; and when something is converted."""
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(MissingExtraError, match=r'pip install "slidescan\[ultralytics\]"'):
        load_detector(f"ultralytics:{described(tmp_path)}", mpp=0.25)
    with pytest.raises(MissingExtraError, match=r'pip install "slidescan\[ultralytics\]"'):
        convert_yolo("best.pt", tmp_path / "out", mpp=0.25)


@pytest.mark.parametrize("name", ["best.pt", "ultralytics:best.pt"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name or not, the error names the command that converts it."""
    monkeypatch.chdir(tmp_path)
    Path("best.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelError, match=r"convert_ultralytics\.py best\.pt -o DIR"):
        load_detector(name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "open('ran', 'w')"}, "no layer of a network"),
        ({"activation": "nn.SiLU(open('ran', 'w'))"}, "no layer of a network"),
        ({"activation": "nn.SiLU().__class__"}, "no layer of a network"),
        ({"backbone": [[-1, 1, "TorchVision", [8, "resnet18", "DEFAULT"]]]}, "TorchVision is no layer"),
        ({"backbone": [[-1, 1, "torchvision.ops.nms", []]]}, "no layer of a network"),
        ({"backbone": [[-1, 1, 5, []]]}, "rows"),
        ({"backbone": [["Conv"]]}, "rows"),
        ({"backbone": None}, "rows"),
        ({"nc": 0}, "number of classes"),
        ({"nc": "80"}, "number of classes"),
        ({"head": [[[0], 1, "Detect", [7]]]}, "number of classes"),
        ({"channels": 4}, "3 of RGB"),
        ({"end2end": False}, "found Detect without end2end"),
        ({"head": [[[0], 1, "Segment26", ["nc"]]]}, "found Segment26"),
        ({"head": [[[0], 1, "RTDETRDecoder", ["nc"]]]}, "found RTDETRDecoder"),
    ],
    ids=str,
)
def test_a_description_that_is_no_network_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the package is imported, so that whatever it would have run is not run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"model\.yaml: .*{said}"):
        load_detector(f"ultralytics:{described(tmp_path, **changes)}", mpp=0.25)
    assert not Path("ran").exists()


def test_an_incomplete_directory_is_refused(tmp_path: Path) -> None:
    """No description, no weights, no resolution, another number of classes, no such directory."""
    name = f"ultralytics:{tmp_path}"
    with pytest.raises(ModelError, match=r"expected model\.yaml and model\.safetensors"):
        load_detector(name)
    with pytest.raises(ModelError, match="--model-mpp"):
        load_detector(f"ultralytics:{described(tmp_path)}")
    card = {"name": "a", "classes": ["a", "b"], "mpp": 0.25}
    (tmp_path / "slidescan.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="expected the 1 classes"):
        load_detector(name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected model\.safetensors"):
        load_detector(name)
    (tmp_path / "model.yaml").write_text("a: [")
    with pytest.raises(ModelError, match=r"model\.yaml: expected a YAML file"):
        load_detector(name)
    with pytest.raises(ModelError, match="found none"):
        load_detector("ultralytics:mitosis")


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted YOLO26."""
    return converted(tmp_path_factory.mktemp("yolo"))


def of_ultralytics(network: Any, image: NDArray[np.uint8], size_wh: tuple[int, int], least: float) -> Detections:
    """What ultralytics finds: its network as it is and its own post-processing, on the whole image."""
    suppress = importlib.import_module("ultralytics.utils.nms").non_max_suppression
    network.float().end2end = True
    with torch.no_grad():
        out = network(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    found = suppress(out, conf_thres=least, max_det=300, end2end=True)[0]
    # Corners inside the image, and in order: a random network exchanges some.
    corners = found[:, :4].clamp(min=0).minimum(torch.tensor(size_wh).repeat(2)).reshape(-1, 2, 2)
    return Detections.build(torch.cat((corners.amin(1), corners.amax(1)), 1), found[:, 4], found[:, 5])


@NEEDS_ULTRALYTICS
@pytest.mark.parametrize("description", END2END)
@pytest.mark.parametrize(("height", "width", "least"), [(256, 320, 0.4), (64, 96, 0.15)])
def test_it_finds_what_ultralytics_finds(
    tmp_path: Path, description: str, height: int, width: int, least: float
) -> None:
    """Scores, labels and boxes of a converted checkpoint are those of the untouched network, best first."""
    detector = load_detector(f"ultralytics:{converted(tmp_path, description)}", device="cpu")
    image = picture(height, width)
    seen = image
    if "p6" in description:  # a level of stride 64 px: below and at the right it sees grey
        seen = np.full((-height % 64 + height, -width % 64 + width, 3), 114, np.uint8)
        seen[:height, :width] = image
    found = detector.detect(image[None], 0.0)[0]
    expected = of_ultralytics(trained(description), seen, (width, height), least)
    assert 10 < len(expected) < len(found) <= detector.max_per_tile == 300
    assert (np.diff(found.score) <= 0).all()
    assert_same(found[: len(expected)], expected, deep=100)


@NEEDS_ULTRALYTICS
def test_a_directory_says_what_a_scan_must_know(yolo: Path) -> None:
    """Class names and tile come from the checkpoint; weights are as it held them; no folder of a person is named."""
    detector = load_detector(f"ultralytics:{yolo}", mpp=2.0)
    assert isinstance(detector, Detector)
    assert (detector.name, detector.mpp, detector.input_px, list(detector.classes)) == (
        "tiny", 0.25, 256, ["cell", "other"],
    )  # fmt: skip
    assert detector.runs_on.endswith(f"fp32, ultralytics {importlib.import_module('ultralytics').__version__}")
    assert {t.dtype for t in safetensors.torch.load_file(yolo / "model.safetensors").values()} == {
        torch.float16, torch.int64,
    }  # fmt: skip
    assert "yaml_file" not in (yolo / "model.yaml").read_text()
    assert sorted(p.name for p in yolo.iterdir()) == ["model.safetensors", "model.yaml", "slidescan.json"]
    with pytest.raises(ModelError, match="expected precision fp32"):
        load_detector(f"ultralytics:{yolo}", precision="bf16").detect(picture()[None], 0.5)


@NEEDS_ULTRALYTICS
def test_it_is_light_pickles_without_weights_and_is_held_once(yolo: Path) -> None:
    """A path and two words; the package and torch come with the first tile; two detectors share one network."""
    code = f"""
import sys
from slidescan.detect import load_detector
load_detector("ultralytics:{yolo}").at(0.3).sha256
assert not {{"torch", "ultralytics"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    detector = load_detector(f"ultralytics:{yolo}", device="cpu")
    found = detector.detect(picture()[None], 0.1)[0]
    packed = pickle.dumps(detector)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert (again, again.sha256) == (detector, detector.sha256)
    assert again._network() is detector._network()
    np.testing.assert_array_equal(again.detect(picture()[None], 0.1)[0].xyxy, found.xyxy)


@NEEDS_ULTRALYTICS
def test_a_tile_does_not_depend_on_its_neighbours(yolo: Path) -> None:
    """Alone, in a batch, and beside tiles of another size in another thread, results are bit-identical."""
    detector = load_detector(f"ultralytics:{yolo}", device="cpu")
    tiles = {size: np.stack([picture(*size), picture(*size)[::-1]]) for size in ((64, 96), (96, 64))}
    alone = {size: [detector.detect(tile[None], 0.0)[0] for tile in both] for size, both in tiles.items()}
    differences = []

    def run(size: tuple[int, int]) -> None:
        for _ in range(5):
            for one, other in zip(detector.detect(tiles[size], 0.0), alone[size], strict=True):
                differences.append(np.abs(one.xyxy - other.xyxy).max() + np.abs(one.score - other.score).max())

    threads = [threading.Thread(target=run, args=(size,)) for size in tiles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences == [0.0] * 20


@NEEDS_ULTRALYTICS
def test_a_card_calibrates_and_a_family_chooses(yolo: Path, tmp_path: Path) -> None:
    """Scores follow temperature and offset; directories of several resolutions are one detector."""
    for name, change in {"fine": {}, "coarse": {"mpp": 0.5, "temperature": 2.0, "offset": -1.0}}.items():
        card = Path(shutil.copytree(yolo, tmp_path / name)) / "slidescan.json"
        card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    family = load_detector(f"ultralytics:{tmp_path}", device="cpu")
    assert isinstance(family, Family)
    assert (family.at(0.25).mpp, family.at(0.5).mpp) == (0.25, 0.5)
    plain, calibrated = (family.at(mpp).detect(picture()[None], 0.0)[0] for mpp in (0.25, 0.5))
    logit = torch.from_numpy(plain.score).logit() / 2 - 1
    np.testing.assert_allclose(calibrated.score, logit.sigmoid(), atol=1e-6)


@NEEDS_ULTRALYTICS
def test_pictures_of_any_size(yolo: Path, tmp_path: Path) -> None:
    """Small ones are scored whole; those of large ones lie on the picture, in Python and on the command line."""
    detector = load_detector(f"ultralytics:{yolo}", device="cpu")
    assert isinstance(detector, Model)
    small, image = picture(50, 91), picture(300, 400)
    assert_equal(ss.detect_image(small, detector, min_score=1e-3), scored_whole(detector, small))
    found = ss.detect_image(image, detector, min_score=0.5, tile_px=160)
    assert (found.centers > [200, 150]).all(1).any()
    assert (found.xyxy >= 0).all()
    assert (found.xyxy <= [400, 300, 400, 300]).all()
    Image.fromarray(image).save(tmp_path / "picture.png")
    arguments = ("--model", f"ultralytics:{yolo}", "--min-score", "0.5", "--tile-px", "160")
    done = slidescan("detect", tmp_path / "picture.png", *arguments)
    assert (done.returncode, done.stderr) == (0, f"{len(found)} found with a score of at least 0.5\n")
    assert len(done.stdout.splitlines()) == len(found)


@NEEDS_ULTRALYTICS
def test_the_package_is_kept_quiet_and_the_process_as_it_was(yolo: Path, tmp_path: Path) -> None:
    """Nothing is looked up, printed or left in the home directory; variables, printing and saving are as before."""
    code = f"""
import os, socket
import numpy as np, torch
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.getaddrinfo = socket.socket.connect = refuse
from slidescan.detect import load_detector
def state(): return dict(os.environ), np.get_printoptions(), torch.save, torch.load, repr(torch.arange(400) / 3)
before, chance = state(), torch.get_rng_state()
load_detector("ultralytics:{yolo}").detect(np.zeros((1, 64, 64, 3), np.uint8), 0.5)
assert state() == before and torch.equal(torch.get_rng_state(), chance)
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("YOLO", "OMP", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(home.iterdir())


@NEEDS_ULTRALYTICS
def test_damage_is_one_clear_error(yolo: Path, tmp_path: Path) -> None:
    """Truncated, foreign and not finite weights, and a layer that this version does not have."""
    copied = Path(shutil.copytree(yolo, tmp_path / "broken"))
    weights, description = copied / "model.safetensors", copied / "model.yaml"
    content, text = weights.read_bytes(), description.read_text()
    tensors = safetensors.torch.load(content)

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said):
            load_detector(f"ultralytics:{copied}").detect(picture()[None], 0.5)

    weights.write_bytes(content[: len(content) // 2])
    refused("cannot load the weights")
    key = "model.0.conv.weight"
    safetensors.torch.save_file(tensors | {key: tensors[key][:1].clone()}, weights)
    refused(f"1 entries do not, such as {key}")
    safetensors.torch.save_file(tensors | {key: tensors[key] * float("nan")}, weights)
    refused("NaN")
    weights.write_bytes(content)
    for layer in ("NoSuchLayer", "DetectionModel", "torch_safe_load", "nn.init"):
        description.write_text(text.replace("C2PSA", layer))
        refused(f"found {layer}")
    description.write_text(text.replace("[1024, 5, 3, true]", "[1024, five]"))
    refused(r"cannot build the network that model\.yaml describes")
