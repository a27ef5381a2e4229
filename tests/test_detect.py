"""Finding, choosing, loading and running detectors."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slidescan.detect import Card, Family, Model, load_detector, write_model
from slidescan.detect.network import Network
from slidescan.detect.surgery import set_anchors
from slidescan.detect.weights import load_network
from slidescan.detections import Detector, distinct
from slidescan.errors import ModelError, ResolutionError
from slidescan.phantom import Phantom, write_phantom
from slidescan.slides import open_slide
from slidescan.train import metrics
from slidescan.train.agreement import grid_shift_agreement
from slidescan.train.crops import load_crops
from slidescan.train.fields import FieldMaker
from slidescan.train.network import build_network
from tests.tiny import noise

BUNDLED = Path(sys.modules[load_detector.__module__].__file__ or "").parent / "models" / "mitosis"


def test_a_model_directory_is_a_detector(tiny: Path) -> None:
    """The card's facts are there before any weight is read, and the object satisfies the protocol."""
    detector = load_detector(tiny)
    assert isinstance(detector, Detector)
    assert (detector.name, detector.mpp, detector.input_px, detector.object_um) == ("tiny", 0.5, 128, 10.0)
    assert (detector.threshold, detector.max_per_tile, list(detector.classes)) == (0.3, 12, ["cell", "other"])
    assert len(detector.sha256) == 64


def test_what_is_said_twice_is_merged(copied: Path) -> None:
    """With `merge_iou` in the card: the best of what overlaps by more in its class, and room for fewer objects."""
    tile = noise(1, 96, 96)
    said = load_detector(copied).detect(tile, 0.0)[0]
    card = json.loads((copied / "slidescan.json").read_text())
    (copied / "slidescan.json").write_text(json.dumps(card | {"merge_iou": 0.1}))
    detector = load_detector(copied)
    merged = detector.detect(tile, 0.0)[0]
    assert detector.max_per_tile == 1
    assert 0 < len(merged) < len(said)
    np.testing.assert_array_equal(merged.xyxy, distinct(said, 0.1).xyxy)


def test_a_tile_with_fewer_cells_than_queries_is_scored(tmp_path: Path) -> None:
    """320 cells are on a tile of 128 px, 80 on one of 64."""
    torch.manual_seed(0)
    card = Card("many", ("cell",), 0.5, input_px=128, object_um=10.0, anchor_px=24.0)
    write_model(build_network(["cell"], width=0.25, queries=300), card, tmp_path / "many")
    found = load_detector(tmp_path / "many").detect(noise(1, 64, 96), 0.0)[0]
    assert len(found) == 300
    assert (found.xyxy <= [96, 64, 96, 64]).all()


def test_who_may_read_the_card_may_read_the_weights(tiny: Path) -> None:
    """A model on a shared disk is for all who see its directory."""
    assert len({(tiny / name).stat().st_mode for name in ("config.json", "slidescan.json", "model.safetensors")}) == 1


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 160)])
def test_detections_are_sorted_inside_and_above_the_threshold(tiny: Path, height: int, width: int) -> None:
    """Tiles of any multiple of 32 give boxes within the tile, best first, none below the least score asked for."""
    everything = load_detector(tiny).detect(noise(2, height, width), 0.0)
    assert [len(d) for d in everything] == [12, 12]
    for found in everything:
        assert (np.diff(found.score) <= 0).all()
        assert (found.xyxy >= 0).all()
        assert (found.xyxy[:, 2:] <= [width, height]).all()
        assert (found.xyxy[:, 2:] >= found.xyxy[:, :2]).all()
        assert set(found.label) <= {0, 1}
    cut = float(np.median(everything[0].score))
    fewer = load_detector(tiny).detect(noise(2, height, width), cut)[0]
    assert len(fewer) == int((everything[0].score >= cut).sum())


def test_a_tile_does_not_depend_on_its_neighbours(tiny: Path) -> None:
    """Alone, in a batch and in another order, a tile gives bit-identical results."""
    tiles = noise(3, 64, 64)
    detector = load_detector(tiny, device="cpu")
    together = detector.detect(tiles, 0.0)
    turned = detector.detect(tiles[::-1], 0.0)[::-1]
    for i in range(3):
        alone = detector.detect(tiles[i : i + 1], 0.0)[0]
        for other in (together[i], turned[i]):
            np.testing.assert_array_equal(alone.xyxy, other.xyxy)
            np.testing.assert_array_equal(alone.score, other.score)
    assert detector.detect(tiles[:0], 0.0) == []


def test_making_it_ready_keeps_the_outputs(tiny: Path) -> None:
    """Folded normalisation, the other attention and fixed-size batches give what plain transformers gives."""
    plain = load_network(tiny).eval()
    set_anchors(plain, 24.0)
    tile = noise(1, 96, 160)
    with torch.no_grad():
        out = plain(torch.from_numpy(tile).permute(0, 3, 1, 2) / 255)
    score, query = out.logits[0].sigmoid().flatten().sort(descending=True)
    found = load_detector(tiny, device="cpu").detect(tile, 0.0)[0]
    np.testing.assert_allclose(found.score, score[:12].numpy(), atol=1e-5)
    centre = out.pred_boxes[0, query[:12] // 2, :2].numpy() * [160, 96]
    inside = ((found.xyxy > 0) & (found.xyxy < [160, 96, 160, 96])).all(1)
    np.testing.assert_allclose(found.centers[inside], centre[inside], atol=0.01)


@pytest.mark.parametrize("size", [64, 96, 160])
def test_anchors_have_one_size_whatever_the_tile(tiny: Path, size: int) -> None:
    """With `anchor_px` every cell of every level has a valid anchor of that many px."""
    network: Any = load_network(tiny)
    set_anchors(network, 24.0)
    shapes = ((size // 8, size // 8), (size // 16, size // 16))
    anchors, valid = network.model.generate_anchors(shapes)
    assert anchors.shape == (1, sum(h * w for h, w in shapes), 4)
    assert valid.all()
    torch.testing.assert_close(anchors.sigmoid()[..., 2:] * size, torch.full((1, anchors.shape[1], 2), 24.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_detector_says_what_it_runs_on(tiny: Path, precision: Literal["fp32", "bf16"]) -> None:
    """Device and precision are those asked for; auto on a CPU is float32."""
    assert load_detector(tiny, device="cpu", precision=precision).runs_on == f"cpu, {precision}"
    assert load_detector(tiny, device="cpu").runs_on == "cpu, fp32"


def test_bf16_convolutions_keep_float32_boxes(tiny: Path) -> None:
    """The lower precision is available on a CPU and gives as many, finite, detections."""
    found = load_detector(tiny, device="cpu", precision="bf16").detect(noise(1, 64, 64), 0.0)[0]
    assert len(found) == 12
    assert np.isfinite(found.xyxy).all()


def test_a_detector_pickles_without_weights(tiny: Path) -> None:
    """Sent to another process it is a path and two words, and finds the same there."""
    detector = load_detector(tiny)
    tiles = noise(1, 64, 64)
    before = detector.detect(tiles, 0.0)[0]
    packed = pickle.dumps(detector)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert again == detector
    assert again.sha256 == detector.sha256
    np.testing.assert_array_equal(again.detect(tiles, 0.0)[0].xyxy, before.xyxy)


def test_the_digest_covers_weights_configuration_and_card(tiny: Path, copied: Path) -> None:
    """A change in any of the three files is another detector."""
    card = copied / "slidescan.json"
    card.write_text(card.read_text().replace("0.3", "0.4"))
    assert load_detector(copied).sha256 != load_detector(tiny).sha256


def test_listing_a_detector_loads_no_torch() -> None:
    """Name, classes and variants can be had without torch or transformers."""
    code = (
        "import sys; from slidescan.detect import load_detector; d = load_detector('mitosis'); d.at(0.5).sha256;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_slide_chooses_the_variant() -> None:
    """The finest variant that is at most 1.25 times finer than the slide is taken; the family itself is its finest."""
    family = load_detector("mitosis")
    assert isinstance(family, Family)
    assert isinstance(family, Detector)
    assert [family.at(mpp).mpp for mpp in (0.1, 0.262, 0.3125, 0.35, 0.499, 0.625)] == [0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert family.at(0.25).at(0.25) == family.at(0.25)
    finest = family.at(0.25)
    for fact in (
        "name",
        "classes",
        "attributes",
        "mpp",
        "input_px",
        "object_um",
        "halo_um",
        "max_per_tile",
        "threshold",
        "color",
        "runs_on",
    ):
        assert getattr(family, fact) == getattr(finest, fact)
    assert pickle.loads(pickle.dumps(family)) == family
    # Other weights of any variant are another detector, and a slide may need that one.
    alone = [
        Family(family.title, variants).sha256
        for variants in (family.variants, family.variants[:1], family.variants[1:])
    ]
    assert len(set(alone)) == 3


def test_too_coarse_a_slide_is_refused_unless_asked_for() -> None:
    """Beyond 1.25 times the coarsest variant the error names both numbers and the option, which then serves."""
    family = load_detector("mitosis")
    with pytest.raises(ResolutionError, match=r"0\.625 µm/px.*got 0\.63.*--allow-coarse"):
        family.at(0.63)
    assert family.at(1.0, allow_coarse=True).mpp == 0.5
    with pytest.raises(ResolutionError):
        family.at(0.25).at(0.4)
    with pytest.raises(ResolutionError):
        family.at(float("nan"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mpp": 1.0, "classes": ["other", "cell"]}, "have other classes"),
        ({"mpp": 1.0, "classes": ["cell"], "attributes": ["other"]}, "have other classes"),
        ({}, "are both for 0.5 µm/px"),
    ],
)
def test_a_directory_of_several_detectors_is_no_family(
    tiny: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    """A label would have the name it has in another one, or only the first would be used."""
    for name in "ab":
        shutil.copytree(tiny, tmp_path / name)
    card = tmp_path / "b" / "slidescan.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    with pytest.raises(ModelError, match=f"a and b {said}"):
        load_detector(tmp_path)


def test_the_callers_half_precision_is_not_the_detectors(tiny: Path) -> None:
    """Within autocast, as while one trains, boxes are float32's."""
    detector = load_detector(tiny, device="cpu")
    (expected,) = detector.detect(noise(1, 128, 128), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = detector.detect(noise(1, 128, 128), 0.0)
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)


def test_a_batch_that_another_thread_halves() -> None:
    """What a batch began with it ends with."""
    sizes: list[int] = []

    def forward(tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(tiles))
        made._batch = 2  # as the other thread does, out of memory
        nothing = tiles.new_zeros((len(tiles), 1), dtype=torch.float32)
        return nothing, nothing.long(), nothing[..., None].expand(-1, -1, 4), nothing[..., None][..., :0]

    made = Network(forward, name="x", device="cpu")
    made._batch = 4
    assert len(made.detect(noise(6, 32, 32), 0.0)) == 6
    assert sizes == [4, 2]


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan")])
def test_a_resolution_that_cannot_be_is_refused(copied: Path, mpp: float) -> None:
    """Before a slide is found too coarse for it."""
    (copied / "slidescan.json").unlink()
    with pytest.raises(ModelError, match="above 0"):
        load_detector(copied, mpp=mpp)


@pytest.mark.parametrize(
    "change",
    [
        {"decoder_layers": "three"},
        {"backbone_config": "abc"},
        {"id2label": ["a"]},
        {"num_queries": "many"},
        {"architectures": 5},
    ],
)
def test_a_wrong_configuration_is_one_line(copied: Path, change: dict[str, object]) -> None:
    """Whatever transformers raises over it."""
    config = copied / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ModelError) as caught:
        load_detector(copied).detect(noise(1, 64, 64), 0.0)
    assert "\n" not in str(caught.value)


def test_a_plain_transformers_directory_needs_its_resolution(copied: Path) -> None:
    """Without a card the µm/px must be given; classes come from the configuration."""
    (copied / "slidescan.json").unlink()
    with pytest.raises(ModelError, match="mpp="):
        load_detector(copied)
    detector = load_detector(copied, mpp=0.4)
    assert (detector.mpp, detector.threshold, list(detector.classes)) == (0.4, 0.5, ["cell", "other"])
    assert len(detector.detect(noise(1, 96, 96), 0.0)[0]) == 12
    assert pickle.loads(pickle.dumps(detector)).mpp == 0.4


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (np.zeros((1, 100, 64, 3), np.uint8), "multiple of 32"),
        (np.zeros((1, 64, 64, 3), np.float32), "uint8"),
        (np.zeros((64, 64, 3), np.uint8), r"\(B, H, W, 3\)"),
        (np.zeros((1, 64, 64, 4), np.uint8), r"\(B, H, W, 3\)"),
    ],
)
def test_tiles_of_another_shape_are_refused(tiny: Path, tiles: NDArray[np.uint8], message: str) -> None:
    """The error says which shape was expected."""
    with pytest.raises(ModelError, match=message):
        load_detector(tiny).detect(tiles, 0.0)


def test_damage_is_one_clear_error(copied: Path) -> None:
    """Missing, truncated, foreign and pickled weights, a damaged card and another model type each raise ModelError."""
    weights, config = copied / "model.safetensors", copied / "config.json"
    content, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_detector(copied).detect(noise(1, 64, 64), 0.0)

    weights.write_bytes(content)
    config.write_text(
        text.replace('"num_labels": 2', '"num_labels": 2').replace('"decoder_layers": 3', '"decoder_layers": 4')
    )
    with pytest.raises(ModelError, match="fit config"):
        load_detector(copied).detect(noise(1, 64, 64), 0.0)

    config.write_text(text)
    weights.rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_detector(copied)

    config.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}))
    with pytest.raises(ModelError, match=r"object-detection model.*ViTForImageClassification"):
        load_detector(copied)

    config.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: expected a JSON file"):
        load_detector(copied)


def test_bundled_models_are_small_and_complete() -> None:
    """Each variant's weights stay below 12 MB, and a model card lies beside them."""
    family = load_detector("mitosis")
    assert isinstance(family, Family)
    for model in family.variants:
        assert isinstance(model, Model)
        assert (model.path / "model.safetensors").stat().st_size < 12e6
        assert list(model.classes) == ["mitotic figure"]
    assert (BUNDLED / "README.md").is_file()


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_blank_tiles_give_nothing(mpp: float) -> None:
    """White, grey, black and pink tiles hold no figure."""
    tiles = np.empty((4, 256, 256, 3), np.uint8)
    tiles[:] = np.array([[255, 255, 255], [128, 128, 128], [0, 0, 0], [230, 180, 210]], np.uint8)[:, None, None]
    detector = load_detector("mitosis").at(mpp)
    assert [len(d) for d in detector.detect(tiles, detector.threshold)] == [0, 0, 0, 0]


@pytest.mark.data
@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_figures_of_test_patients_are_found(shared: Path, mpp: float) -> None:
    """Most of a handful of crops, shifted off the middle, give a detection on the figure, and little else does."""
    detector = load_detector("mitosis").at(mpp)
    crops = load_crops(shared / "data", "test", mpp=mpp, limit=24)
    edge = crops[0].image.shape[0]
    canvas = np.concatenate([np.concatenate([c.image for c in crops[i : i + 6]], 1) for i in range(0, 24, 6)], 0)
    canvas = np.roll(canvas, (edge // 4, edge // 4), (0, 1))
    found = detector.detect(canvas[None], 0.05)[0]  # what a scan keeps
    hit = 0
    for i, crop in enumerate(crops):
        shift = np.array([i % 6, i // 6]) * edge + edge // 4
        centres = (crop.figures[:, :2] + shift) % [6 * edge, 4 * edge]
        distance = np.linalg.norm(found.centers[:, None] - centres, axis=-1)
        hit += bool((distance.min(0) <= 7.5 / mpp).any()) if len(found) else 0
    assert hit >= 20
    assert len(found) <= hit + 3


@pytest.mark.data
def test_mosaics_of_test_patients_are_read_as_the_model_card_says(shared: Path) -> None:
    """At the shipped threshold F1 at 7.5 µm is above 0.9 on 3 x 3 mosaics; the card says 0.93 on 288 of them."""
    detector = load_detector("mitosis").at(0.25)
    crops = load_crops(shared / "data", "test")
    maker, rng = FieldMaker(crops, 0), np.random.default_rng(7)
    images = []
    for _ in range(48):
        image, figures = maker.mosaic(rng, 3 * crops[0].image.shape[0], roll=True)
        found = detector.detect(image[None], 0.05)[0]
        images.append(metrics.Image(found, figures[:, :2], metrics.RADIUS_UM / 0.25, len(image), 4.0 / 0.25))
    assert metrics.score(images, detector.threshold).f1 >= 0.9


def test_the_grid_has_no_say_in_what_the_bundled_detector_finds(tmp_path: Path) -> None:
    """On a phantom under shifted grids of tiles, all that is found above the threshold comes back, as the card says."""
    write_phantom(tmp_path / "phantom.tiff", Phantom((2048, 2048), 0.5, seed=11, n_figures=60))
    agreed = grid_shift_agreement(open_slide(tmp_path / "phantom.tiff"), load_detector("mitosis"), shifts=1)
    assert agreed.compared > 20
    assert agreed.share >= 0.95
