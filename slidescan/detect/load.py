"""Finding a detector by name, directory or Hugging Face id, choosing its variant, and loading its weights when needed.

Hides directories, digests and the cache of networks. A model directory is what transformers reads (``config.json`` and
``model.safetensors``; pickles are never opened) plus ``slidescan.json``, the card: what a scan must know and
transformers does not. A directory of model directories is a family: one detector at several resolutions.

Invariants: a detector is light (card and digest) until its first tile; it pickles as path, device and precision; a
process holds each network once, whatever the number of detectors and threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.errors import ModelError, ResolutionError

if TYPE_CHECKING:
    from torch import nn

    from slidescan.detect.dfine import Network

__all__ = ["Card", "Family", "Model", "Precision", "load_detector", "write_model"]

Precision = Literal["auto", "fp32", "bf16"]

_BUNDLED = Path(__file__).parent / "models"
_FILES = ("config.json", "model.safetensors", "slidescan.json")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# transformers' model types whose output, normalisation and attention `slidescan.detect.dfine` knows; more go here.
_KNOWN_TYPES = ("d_fine",)
# A slide this many times coarser than a variant still shows what the variant looks for: training varies scale as much.
_COARSER = 1.25

_networks: dict[tuple[str, str, str], Network] = {}
_loading = threading.Lock()


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
    temperature : float
        Divides the logits, so that a score is the share of such detections that are right.
    anchor_px : float, optional
        Edge of its anchors; None where they are transformers' own.
    """

    name: str
    classes: tuple[str, ...]
    mpp: float
    input_px: int = 640
    object_um: float = 15.0
    threshold: float = 0.5
    temperature: float = 1.0
    anchor_px: float | None = None


@dataclass(frozen=True)
class Model:
    """A detector of one resolution.

    Parameters
    ----------
    path : Path
        The model directory.
    device : str, optional
        Such as ``cpu`` or ``cuda:1``; None takes a GPU if there is one.
    precision : {"auto", "fp32", "bf16"}
        Of the convolutions; boxes are computed in float32 always.
    card_mpp : float, optional
        µm/px of a model without a card.
    """

    path: Path
    device: str | None = None
    precision: Precision = "auto"
    card_mpp: float | None = None
    _config: dict[str, Any] = field(init=False, repr=False, compare=False)
    _card: Card = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        config = _read_json(self.path / "config.json")
        kind = config.get("model_type")
        if kind not in _KNOWN_TYPES:
            raise ModelError(
                f"{self.path.name}: expected a model of type {' or '.join(_KNOWN_TYPES)} in config.json, got {kind}"
            )
        if not (self.path / "model.safetensors").is_file():
            raise ModelError(
                f"{self.path.name}: expected model.safetensors beside config.json, found none; pickled weights are not "
                "read, convert them with safetensors"
            )
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_card", _read_card(self.path, config, self.card_mpp))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as what is needed to load it again, never weights."""
        return Model, (self.path, self.device, self.precision, self.card_mpp)

    @property
    def name(self) -> str:
        """Short name for people and file metadata."""
        return self._card.name

    @cached_property
    def sha256(self) -> str:
        """Digest over configuration, weights and card."""
        digest = hashlib.sha256()
        for name in _FILES:
            file = self.path / name
            if file.is_file():
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()

    @property
    def classes(self) -> Sequence[str]:
        """Class names, indexed by label."""
        return self._card.classes

    @property
    def mpp(self) -> float:
        """µm/px it was trained at."""
        return self._card.mpp

    @property
    def input_px(self) -> int:
        """Best tile edge in px at `mpp`."""
        return self._card.input_px

    @property
    def object_um(self) -> float:
        """Edge of the largest object it reports, µm."""
        return self._card.object_um

    @property
    def max_per_tile(self) -> int:
        """Most detections one tile can return."""
        return int(self._config.get("num_queries", 300))  # 300: transformers' default, left out of the file

    @property
    def threshold(self) -> float:
        """Operating score."""
        return self._card.threshold

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> Model:
        """Return itself, if it can read a slide of `slide_mpp`.

        Raises
        ------
        ResolutionError
            If the slide is more than 1.25 times coarser than the model, unless `allow_coarse`.
        """
        return _choose((self,), self.name, slide_mpp, allow_coarse)

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        """Score tiles (B, H, W, 3) RGB at `mpp`; the first call in a process loads the weights.

        Parameters
        ----------
        tiles : ndarray of uint8, shape (B, H, W, 3)
            H and W any multiple of 32 px.
        min_score : float
            In [0, 1].

        Returns
        -------
        list of Detections
            One a tile, in tile px, best first.

        Raises
        ------
        ModelError
            If the weights cannot be loaded or the tiles have another shape.
        """
        return self._network().detect(tiles, min_score)

    def _network(self) -> Network:
        from slidescan.detect.dfine import Network, load_network, resolve

        device, precision = resolve(self.name, self.device, self.precision)
        key = self.sha256, device, precision
        with _loading:
            if key not in _networks:
                _networks[key] = Network(
                    load_network(self.path),
                    name=self.name,
                    device=device,
                    precision=precision,
                    anchor_px=self._card.anchor_px,
                    temperature=self._card.temperature,
                )
            return _networks[key]


@dataclass(frozen=True)
class Family:
    """A detector in variants for several resolutions; where one is needed it is its finest.

    Parameters
    ----------
    title : str
    variants : tuple of Model
        Finest first.
    """

    title: str
    variants: tuple[Model, ...]

    @property
    def name(self) -> str:
        """Name of the finest variant."""
        return self.variants[0].name

    @property
    def sha256(self) -> str:
        """Digest of the finest variant."""
        return self.variants[0].sha256

    @property
    def classes(self) -> Sequence[str]:
        """Class names, indexed by label."""
        return self.variants[0].classes

    @property
    def mpp(self) -> float:
        """µm/px of the finest variant."""
        return self.variants[0].mpp

    @property
    def input_px(self) -> int:
        """Best tile edge of the finest variant."""
        return self.variants[0].input_px

    @property
    def object_um(self) -> float:
        """Edge of the largest object it reports, µm."""
        return self.variants[0].object_um

    @property
    def max_per_tile(self) -> int:
        """Most detections one tile can return."""
        return self.variants[0].max_per_tile

    @property
    def threshold(self) -> float:
        """Operating score of the finest variant."""
        return self.variants[0].threshold

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> Model:
        """Return the finest variant for a slide of `slide_mpp`; the slide may be 1.25 times coarser than the variant.

        Raises
        ------
        ResolutionError
            If the slide is too coarse for every variant, unless `allow_coarse`.
        """
        return _choose(self.variants, self.title, slide_mpp, allow_coarse)

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        """Score tiles with the finest variant."""
        return self.variants[0].detect(tiles, min_score)


def load_detector(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Precision = "auto",
    mpp: float | None = None,
) -> Model | Family:
    """Find a detector; its weights are loaded with its first tile.

    Looked for in this order: a directory, a bundled name (``mitosis``), a Hugging Face id (``owner/name``: fetched or
    taken from the local cache, safetensors only).

    Parameters
    ----------
    name_or_path : str or path
    device : str, optional
        Such as ``cpu`` or ``cuda:1``; None takes a GPU if there is one.
    precision : {"auto", "fp32", "bf16"}
        Of the convolutions. auto is bf16 on a GPU and fp32 on a CPU.
    mpp : float, optional
        µm/px the model was trained at, for a transformers directory without ``slidescan.json``.

    Raises
    ------
    ModelError
        If there is no such model, or its directory is incomplete or damaged.

    Examples
    --------
    >>> detector = load_detector("mitosis")
    >>> detector.at(0.26).name, detector.at(0.499).name
    ('mitosis-0.25', 'mitosis-0.5')
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ModelError(f"{name_or_path}: expected precision auto, fp32 or bf16, got {precision}")
    path = Path(name_or_path)
    if not path.is_dir():
        bundled = _BUNDLED / str(name_or_path)
        if path.name == str(name_or_path) and bundled.is_dir():
            path = bundled
        elif _HUB_ID.fullmatch(str(name_or_path)) and not path.exists():
            path = _from_hub(str(name_or_path))
        else:
            known = ", ".join(sorted(p.name for p in _BUNDLED.iterdir() if p.is_dir()))
            raise ModelError(
                f"{name_or_path}: expected a model directory, a bundled name ({known}) or a Hugging Face id "
                "(owner/name), found none"
            )
    if (path / "config.json").is_file():
        return Model(path.resolve(), device, precision, mpp)
    models = [
        Model(sub.resolve(), device, precision, mpp)
        for sub in sorted(path.iterdir())
        if (sub / "config.json").is_file()
    ]
    if not models:
        raise ModelError(
            f"{name_or_path}: expected config.json and model.safetensors, or sub-directories that hold them, "
            "found neither"
        )
    return Family(path.name, tuple(sorted(models, key=lambda m: m.mpp)))


def write_model(network: nn.Module, card: Card, directory: Path) -> None:
    """Write a model directory: configuration, weights and card.

    Matrices and kernels are stored as float16, which halves the file and hardly moves a score (the bundled model's
    README says how much); statistics and biases stay float32.
    """
    from dataclasses import asdict

    from slidescan.detect.dfine import save_network

    directory.mkdir(parents=True, exist_ok=True)
    save_network(network, directory)
    text = json.dumps(asdict(card), indent=1)
    (directory / "slidescan.json").write_text(text + "\n", encoding="utf-8")


def _choose(variants: Sequence[Model], title: str, slide_mpp: float, allow_coarse: bool) -> Model:
    for variant in variants:
        if slide_mpp <= variant.mpp * _COARSER:
            return variant
    coarsest = variants[-1]
    if allow_coarse:
        return coarsest
    raise ResolutionError(
        f"{title}: expected a slide of at most {coarsest.mpp * _COARSER:.3g} µm/px (the model was trained at "
        f"{coarsest.mpp:g}), got {slide_mpp:.4g}; scan it all the same with --allow-coarse"
    )


def _read_card(path: Path, config: dict[str, Any], mpp: float | None) -> Card:
    if (path / "slidescan.json").is_file():
        table = _read_json(path / "slidescan.json")
        known = set(Card.__dataclass_fields__)
        try:
            table = {**table, "classes": tuple(table["classes"])}
            card = Card(**{key: value for key, value in table.items() if key in known})
            numbers = card.mpp, card.input_px, card.object_um, card.temperature
            if not (min(float(n) for n in numbers) > 0 and 0 <= card.threshold <= 1 and card.input_px % 32 == 0):
                raise ValueError("a number is out of range")
        except (KeyError, TypeError, ValueError) as exc:
            raise ModelError(
                f"{path.name}/slidescan.json: expected name, classes, mpp and numbers above 0, input_px a multiple of "
                f"32 and threshold from 0 to 1: {exc}"
            ) from exc
        return card
    if mpp is None:
        raise ModelError(
            f"{path.name}: expected slidescan.json or the model's resolution, found neither; pass mpp=… (µm/px it was "
            "trained at)"
        )
    labels = config.get("id2label") or {"0": "object"}
    return Card(path.name, tuple(labels[key] for key in sorted(labels, key=int)), mpp)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path.parent.name}/{path.name}: expected a JSON file, cannot read it ({exc})") from exc
    if not isinstance(table, dict):
        raise ModelError(f"{path.parent.name}/{path.name}: expected a JSON object, got {type(table).__name__}")
    return table


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, allow_patterns=[name for file in _FILES for name in (file, f"*/{file}")])
        )
    except (OSError, ValueError) as exc:  # its own errors, and those of the network, derive from these
        raise ModelError(
            f"{repository}: expected a directory or a model on the Hugging Face hub, cannot fetch it "
            f"({type(exc).__name__}); check the name and the connection"
        ) from exc
