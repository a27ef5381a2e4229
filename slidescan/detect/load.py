"""Finding a detector by name, directory or Hugging Face id, choosing its variant, and loading its weights when needed.

Hides names, directories and the cache of networks. A directory of model directories (see `slidescan.detect.card`) is a
family: one detector at several resolutions.

Invariants: a detector is light (card and digest) until its first tile; it pickles as path, device and precision; a
process holds each network once, whatever the number of detectors and threads.
"""

from __future__ import annotations

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

from slidescan.detect.card import MODEL_FILES, Card, Colours, digest, read_card, read_json
from slidescan.detections import Detections
from slidescan.errors import ModelError, ResolutionError

if TYPE_CHECKING:
    from slidescan.detect.network import Network

__all__ = ["Family", "Model", "Precision", "load_detector"]

Precision = Literal["auto", "fp32", "bf16"]

_BUNDLED = Path(__file__).parent / "models"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# A slide this many times coarser than a variant still shows what the variant looks for: training varies scale as much.
_COARSER = 1.25

_networks: dict[tuple[str, str, str], Network] = {}
_loading = threading.Lock()


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
        config = read_json(self.path / "config.json")
        kinds = [str(kind) for kind in config.get("architectures") or ()]
        if not any(kind.endswith("ForObjectDetection") for kind in kinds):
            raise ModelError(
                f"{self.path.name}: expected an object-detection model of transformers in config.json, found "
                f"architectures {', '.join(kinds) or 'not named'}"
            )
        if "text_config" in config:
            raise ModelError(
                f"{self.path.name}: expected a model that needs nothing but an image, found one of type "
                f"{config.get('model_type')}, which needs a text prompt, too; choose one without text_config in "
                "config.json"
            )
        if not (self.path / "model.safetensors").is_file():
            raise ModelError(
                f"{self.path.name}: expected model.safetensors beside config.json, found none; pickled weights are not "
                "read, convert them with safetensors"
            )
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_card", read_card(self.path, config, self.card_mpp))

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
        return digest(self.path)

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
        counts = [self._config.get(key) for key in ("num_queries", "num_detection_tokens")]  # tokens: YOLOS
        return next((int(count) for count in counts if count), 300)  # 300: transformers' default in most families

    @property
    def runs_on(self) -> str:
        """Device and precision it computes in on this machine, such as ``cpu, fp32``; asking imports torch."""
        from slidescan.detect.network import resolve

        return ", ".join(resolve(self.name, str(self._config.get("model_type")), self.device, self.precision))

    @property
    def color(self) -> Literal["raw", "srgb"]:
        """The colours it was trained on."""
        return self._card.color

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
        from slidescan.detect.network import Network, load_network, resolve

        device, precision = resolve(self.name, str(self._config.get("model_type")), self.device, self.precision)
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
                    offset=self._card.offset,
                    colours=Colours.read(self.path),
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
    def runs_on(self) -> str:
        """Device and precision it computes in on this machine."""
        return self.variants[0].runs_on

    @property
    def color(self) -> Literal["raw", "srgb"]:
        """The colours it was trained on."""
        return self.variants[0].color

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


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, allow_patterns=[name for file in MODEL_FILES for name in (file, f"*/{file}")])
        )
    except (OSError, ValueError) as exc:  # its own errors, and those of the network, derive from these
        raise ModelError(
            f"{repository}: expected a directory or a model on the Hugging Face hub, cannot fetch it "
            f"({type(exc).__name__}); check the name and the connection"
        ) from exc
