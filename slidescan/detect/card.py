"""The model directory: what transformers reads, and the card that says what a scan must know.

Hides file names and checks. A directory holds ``config.json`` and ``model.safetensors`` (transformers' own; pickles are
never opened) and ``slidescan.json``, the card; `slidescan.detect.yolo` says what another library's holds. Importing
this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slidescan.detections import COLUMNS
from slidescan.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MODEL_FILES",
    "SHARDS",
    "Card",
    "Colours",
    "digest",
    "read_card",
    "read_json",
    "title",
    "write_card",
    "write_model",
]

MODEL_FILES = (
    "config.json", "model.safetensors", "slidescan.json", "preprocessor_config.json", "processor_config.json"
)  # fmt: skip
SHARDS = "model.safetensors.index.json"  # of weights in several files, which are not read
# transformers' defaults where a processor's file leaves them out; all of DETR's kin normalise but these, of which some
# subtract nothing where they do.
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_PLAIN, _NOTHING = ("RTDetr", "PPDocLayout"), {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
# Kinds of models that transformers gives such a processor.
_PLAIN_MODELS = frozenset({"rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3"})
_MOST_CLASSES = 2**15  # a label has 16 bits
_PHOTO_PX = 640  # edge of the images most DETR-type models are trained on, where nothing says so


@dataclass(frozen=True, slots=True)
class Card:
    """What ``slidescan.json`` says of a model; field names are its keys.

    Parameters
    ----------
    name : str
    classes : tuple of str
        Indexed by label.
    mpp : float
        µm/px it was trained at.
    input_px : int
        Best tile edge, a multiple of 32.
    object_um : float
        Edge of the largest object, µm.
    threshold : float
        Operating score.
    temperature, offset : float
        A score is sigmoid(logit / temperature + offset), so that it is the share of such detections that are right.
    anchor_px : float, optional
        Edge of its anchors; None where they are transformers' own.
    merge_iou : float, optional
        Boxes of a tile and class that overlap by more say the same object, the best of them for all; None where a
        network says each object once.
    halo_um : float, optional
        Margin a tile needs beyond its core for its place not to matter, µm; None where nobody measured it.
    color : {"raw", "srgb"}
        Colours it was trained on: the scanner's own, or converted to sRGB by the slide's ICC profile.
    attributes : tuple of str
        What it says of each object besides its class, as a probability; its last logits, after those of the classes.
    attribute_cuts : tuple of float
        Probability from which each attribute is best said, chosen on validation data.
    training : dict
        How it was trained: steps, seed, windows mined, and by which of the settings its annotations were read.
    """

    name: str
    classes: tuple[str, ...]
    mpp: float
    input_px: int = 640
    object_um: float = 15.0
    threshold: float = 0.5
    temperature: float = 1.0
    offset: float = 0.0
    anchor_px: float | None = None
    merge_iou: float | None = None
    halo_um: float | None = None
    color: Literal["raw", "srgb"] = "raw"
    attributes: tuple[str, ...] = ()
    attribute_cuts: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Colours:
    """How grey levels from 0 to 255 become a model's input: times `scale`, minus `mean`, divided by `spread`."""

    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    spread: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def mean_and_spread(self) -> tuple[list[float], list[float]]:
        """The same in grey levels."""
        return [m / self.scale for m in self.mean], [s / self.scale for s in self.spread]

    @classmethod
    def read(cls, path: Path) -> Colours:
        """Read them from the file of transformers' image processor; without one, they are usual for the kind of model.

        Raises
        ------
        ModelError
            If the file is damaged.
        """
        name, table = _processor(path)
        try:
            scale = float(table.get("rescale_factor", 1 / 255)) if table.get("do_rescale", True) else 1.0
            if not 0 < scale < math.inf:
                raise ValueError("a rescale_factor above 0")
            told, kind = _made_for(path, table)
            # Left out of the file, it is what the processor's class has, and that what the kind of model has.
            normalises = not told.startswith(_PLAIN) if told else kind != "" and kind not in _PLAIN_MODELS
            if not table.get("do_normalize", normalises):
                return cls(scale)
            defaults = _NOTHING if told.startswith(_PLAIN[1]) else _IMAGENET
            mean, spread = (tuple(map(float, table.get(key, usual))) for key, usual in defaults.items())
            if len(mean) != 3 or len(spread) != 3 or not min(spread) > 0 or not all(map(math.isfinite, mean + spread)):
                raise ValueError("three finite channels, and a scale and spread above 0")
        except (KeyError, TypeError, ValueError) as exc:
            raise ModelError(
                f"{path.name}/{name}: expected rescale_factor, image_mean and image_std of three channels: {exc}"
            ) from exc
        return cls(scale, mean, spread)


def _processor(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the file that tells how pictures are prepared, and what it says; transformers looks in this order."""
    name, whole = "preprocessor_config.json", "processor_config.json"  # of pictures; of pictures and texts
    if (path / whole).is_file() and isinstance(inner := read_json(path / whole).get("image_processor"), dict):
        return whole, inner
    return (name, read_json(path / name)) if (path / name).is_file() else ("config.json", {})


def _made_for(path: Path, table: dict[str, Any]) -> tuple[str, str]:
    """Return the class of a processor, "" where neither its file nor the model's says it, and the kind of model."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    keys = ("image_processor_type", "feature_extractor_type")
    told = next((str(said[key]) for said in (table, config) for key in keys if said.get(key)), "")
    return told, str(config.get("model_type") or "")


def digest(path: Path, names: tuple[str, ...] = MODEL_FILES) -> str:
    """Return the SHA-256 over the files of a model directory: configuration, weights and card."""
    whole = hashlib.sha256()
    for name in names:
        file = path / name
        if file.is_file():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            whole.update(f"{name} {content}\n".encode())
    return whole.hexdigest()


def read_card(path: Path, config: dict[str, Any], mpp: float | Literal["px"] | None) -> Card:
    """Read and check the card of a model directory; without one, make it of the configuration and `mpp`.

    Raises
    ------
    ModelError
        If the card is damaged, or there is none and no `mpp`.
    """
    if (path / "slidescan.json").is_file():
        table = read_json(path / "slidescan.json")
        known = set(Card.__dataclass_fields__)
        try:
            lists = {key: tuple(table.get(key, ())) for key in ("attributes", "attribute_cuts")}
            if not isinstance(table["classes"], list) or not all(isinstance(name, str) for name in table["classes"]):
                raise TypeError(f"classes must be a list of names, got {table['classes']!r}")
            table = {**table, "classes": tuple(table["classes"]), **lists}
            card = Card(**{key: value for key, value in table.items() if key in known})
            _check(card)
            said, logits = (*card.classes, *card.attributes), _labels(config)
            if "architectures" in config and len(said) != len(logits):
                raise ValueError(f"config.json has {len(logits)} classes, classes and attributes are {len(said)}")
            if card.color not in ("raw", "srgb"):
                raise ValueError(f"color must be raw or srgb, got {card.color}")
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise ModelError(
                f"{path.name}/slidescan.json: expected name, classes, mpp and numbers above 0, input_px a multiple of "
                "32, threshold and attribute_cuts from 0 to 1, merge_iou between them, halo_um and anchor_px above 0: "
                f"{exc}"
            ) from exc
        return card
    if mpp is None:
        raise ModelError(
            f"{title(path)}: expected slidescan.json or the model's resolution, found neither; say what µm/px it was "
            "trained at: --model-mpp, load_detector(…, mpp=…)"
        )
    if mpp == "px":
        mpp = 1.0
    elif not 0 < mpp < math.inf:
        raise ModelError(f"{title(path)}: expected the µm/px it was trained at, above 0, got {mpp:g}")
    return Card(title(path), _labels(config), mpp, input_px=_trained_px(path))


def title(path: Path) -> str:
    """Return what a model directory is called; in the Hugging Face cache, where it is a hash, the repository's id.

    Examples
    --------
    >>> title(Path("models--acme--detr/snapshots/0123456789abcdef"))
    'acme/detr'
    """
    repository = path.parent.parent.name
    is_cached = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.removeprefix("models--").replace("--", "/") if is_cached else path.name


def _check(card: Any) -> None:
    """Refuse what is of another type or out of range: a number written as text would fail in the middle of a scan."""
    whole = card.input_px, card.mpp, card.object_um, card.temperature
    maybe = [value for value in (card.merge_iou, card.halo_um, card.anchor_px) if value is not None]
    numbers = [*whole, *maybe, card.threshold, card.offset, *card.attribute_cuts]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise TypeError("a number is none")
    if not (isinstance(card.name, str) and card.name.strip() and card.name.isprintable()):
        raise TypeError(f"name must be a line of text, got {card.name!r}")
    names = (*card.classes, *card.attributes)
    if not isinstance(card.training, dict) or not all(isinstance(name, str) for name in names):
        raise TypeError("training must be an object, classes and attributes names")
    if not all(name.strip() and name.isprintable() for name in names) or len({*card.classes}) < len(card.classes):
        raise ValueError(f"classes and attributes: expected lines of text, each class once, got {names}")
    if len({*card.attributes, *COLUMNS}) < len(card.attributes) + len(COLUMNS):
        raise ValueError(f"attributes: expected each once, and none of {', '.join(COLUMNS)}, got {card.attributes}")
    if not (
        all(math.isfinite(value) for value in numbers)
        and min(*whole, *maybe) > 0
        and card.classes
        and 0 <= card.threshold <= 1
        and isinstance(card.input_px, int)
        and card.input_px % 32 == 0
        and (card.merge_iou is None or card.merge_iou < 1)
        and all(0 <= cut <= 1 for cut in card.attribute_cuts)
        and len(card.attribute_cuts) in (0, len(card.attributes))
    ):
        raise ValueError("a number is out of range")


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the class names by label; what the configuration leaves unnamed is called as in transformers.

    A name that was there before gets its label: DETR's ten N/A of COCO would be one class where names tell them apart.
    """
    names = config.get("id2label") or {}
    count = len(names) or config.get("num_labels") or 2  # two: transformers' default, left out of the file
    if not 0 < count <= _MOST_CLASSES:
        raise ModelError(f"config.json: expected 1 to {_MOST_CLASSES} classes, got {count}")
    labels: dict[str, None] = {}
    for label in range(count):
        name = "".join(c if c.isprintable() else "�" for c in str(names.get(str(label), f"LABEL_{label}")))
        labels[f"{name} ({label})" if name in labels else name] = None
    return tuple(labels)


def _trained_px(path: Path) -> int:
    """Return the edge of the images a model was trained on, a multiple of 32, as its image processor says."""
    size = _processor(path)[1].get("size")
    size = {"shortest_edge": size} if isinstance(size, int) else size  # as older processors wrote it
    edges = [size.get(key) for key in ("height", "width", "shortest_edge")] if isinstance(size, dict) else []
    known = [edge for edge in edges if isinstance(edge, int) and edge >= 32]
    return max(known) // 32 * 32 if known else _PHOTO_PX


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ModelError
        If the file is missing or holds something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{path.parent.name}/{path.name}: expected a JSON file, cannot read it ({exc})") from exc
    if not isinstance(table, dict):
        raise ModelError(f"{path.parent.name}/{path.name}: expected a JSON object, got {type(table).__name__}")
    return table


def write_model(network: nn.Module, card: Card, directory: Path) -> None:
    """Write a model directory: configuration, weights and card.

    Matrices and kernels are stored as float16, which halves the file and hardly moves a score (the bundled model's
    README says how much); statistics and biases stay float32.
    """
    from slidescan.detect.weights import save_network

    directory.mkdir(parents=True, exist_ok=True)
    save_network(network, directory)
    write_card(card, directory)


def write_card(card: Card, directory: Path) -> None:
    """Write ``slidescan.json``."""
    text = json.dumps(asdict(card), indent=1)
    (directory / "slidescan.json").write_text(text + "\n", encoding="utf-8")
