"""A detector of one resolution, and a family of such: light until the first tile, then a network in memory.

Hides the card, the choice of a variant and the cache of networks. `Model` is a directory of transformers; what another
library's directory holds is a subclass that reads the configuration and loads the network, and nothing else.

Invariants: a detector is light (card and digest) until its first tile; it pickles as path, device and precision; a
process holds each network once, whatever the number of detectors and threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from slidescan.detect.card import MODEL_FILES, Card, Colours, digest, read_card
from slidescan.detect.configuration import read_configuration
from slidescan.detections import Detections
from slidescan.errors import ModelError, ResolutionError
from slidescan.heap import keep_freed, without_collecting
from slidescan.stages import stage

if TYPE_CHECKING:
    from slidescan.detect.network import Forward, Network

__all__ = ["Family", "Model", "Precision"]

Precision = Literal["auto", "fp32", "bf16"]

# A slide this many times coarser than a variant still shows what the variant looks for: training varies scale as much.
_COARSER = 1.25
# Most, of a network that says an object more than once: the bundled one had 7 on average at 0.25 µm/px and 9.5 in the
# 95th percentile, 4 and 5.4 at 0.5, on fields of 44 and 54 figures a tile.
_QUERIES_PER_OBJECT = 10

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
    card_mpp : float or "px", optional
        µm/px of a model without a card; "px" where it knows pixels only.
    """

    path: Path
    device: str | None = None
    precision: Precision = "auto"
    card_mpp: float | Literal["px"] | None = None
    files: ClassVar[tuple[str, ...]] = MODEL_FILES
    """What its identity depends on; a directory that holds the first is a model."""
    _config: dict[str, Any] = field(init=False, repr=False, compare=False)
    _card: Card = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        config = self._read_config()
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_card", read_card(self.path, config, self.card_mpp))

    def _read_config(self) -> dict[str, Any]:
        """Return what the network's configuration says, once it is sure that it can serve."""
        return read_configuration(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as what is needed to load it again, never weights."""
        return type(self), (self.path, self.device, self.precision, self.card_mpp)

    @property
    def name(self) -> str:
        """Short name for people and file metadata."""
        return self._card.name

    @cached_property
    def sha256(self) -> str:
        """Digest over configuration, weights and card."""
        return digest(self.path, self.files)

    @property
    def classes(self) -> Sequence[str]:
        """Class names, indexed by label."""
        return self._card.classes

    @property
    def attributes(self) -> Sequence[str]:
        """What it says of each object besides its class."""
        return self._card.attributes

    @property
    def attribute_cuts(self) -> Sequence[float]:
        """Probability from which each attribute is best said; a half where nothing was chosen."""
        return self._card.attribute_cuts or (0.5,) * len(self._card.attributes)

    @property
    def mpp(self) -> float:
        """µm/px it was trained at."""
        return self._card.mpp

    @property
    def knows_px_only(self) -> bool:
        """Whether nobody said its µm/px: a picture is then read as it is, whatever its file says."""
        return self.card_mpp == "px" and not (self.path / "slidescan.json").is_file()

    @property
    def input_px(self) -> int:
        """Best tile edge in px at `mpp`."""
        return self._card.input_px

    @property
    def object_um(self) -> float:
        """Edge of the largest object it reports, µm."""
        return self._card.object_um

    @property
    def halo_um(self) -> float | None:
        """Margin a tile needs beyond its core for its place not to matter, µm; None where nobody measured it."""
        return self._card.halo_um

    @property
    def max_per_tile(self) -> int:
        """Most objects that one tile has queries for."""
        keys: tuple[str, ...] = ("num_queries", "num_detection_tokens")  # tokens: YOLOS
        if self._config.get("two_stage"):  # Deformable DETR
            keys = ("two_stage_num_proposals",)
        counts = [self._config.get(key) for key in keys]
        queries = next((int(count) for count in counts if count), 300)  # transformers' default in most families
        return queries if self._card.merge_iou is None else max(1, queries // _QUERIES_PER_OBJECT)

    @property
    def runs_on(self) -> str:
        """Device and precision it computes in on this machine, such as ``cpu, fp32``; asking imports torch."""
        return ", ".join(self._resolved())

    @property
    def color(self) -> Literal["raw", "srgb"]:
        """The colours it was trained on."""
        return self._card.color

    @property
    def threshold(self) -> float:
        """Operating score."""
        return self._card.threshold

    @property
    def training(self) -> Mapping[str, Any]:
        """How it was trained, as far as its card says."""
        return MappingProxyType(self._card.training)

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

    def _resolved(self) -> tuple[str, Literal["fp32", "bf16"]]:
        """Return the device and precision it computes in on this machine."""
        with without_collecting():
            from slidescan.detect.device import resolve

        return resolve(self.name, str(self._config.get("model_type")), self.device, self.precision)

    def _network(self) -> Network:
        """Return the network in memory, loaded once a process."""
        with without_collecting():
            from slidescan.detect.network import Network

        device, precision = self._resolved()
        key = self.sha256, device, precision
        with _loading:
            if key not in _networks:
                keep_freed()
                with stage("load"), without_collecting():
                    forward, merge_iou = self._load(device, precision), self._card.merge_iou
                _networks[key] = Network(forward, name=self.name, device=device, merge_iou=merge_iou)
            return _networks[key]

    def _load(self, device: str, precision: Literal["fp32", "bf16"]) -> Forward:
        """Load the weights and make them ready for tiles."""
        from slidescan.detect.network import Detr
        from slidescan.detect.weights import load_network

        network = load_network(self.path)
        logits, named = int(getattr(network.config, "num_labels", 0)), (*self._card.classes, *self._card.attributes)
        if logits != len(named):
            raise ModelError(f"{self.name}: expected a name for each of {logits} classes, got {len(named)}")
        try:
            return Detr(
                network,
                name=self.name,
                device=device,
                precision=precision,
                anchor_px=self._card.anchor_px,
                temperature=self._card.temperature,
                offset=self._card.offset,
                colours=Colours.read(self.path),
                attributes=len(self._card.attributes),
            )
        except (AttributeError, TypeError, ValueError, ArithmeticError) as exc:  # of numbers that no network has
            raise ModelError(f"{self.name}: expected a config.json that fits its network: {exc}") from exc


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

    def __post_init__(self) -> None:
        for one, other in pairwise(self.variants):
            differ = [kind for kind in ("classes", "attributes") if getattr(one, kind) != getattr(other, kind)]
            if differ or one.mpp == other.mpp:
                said = f"have other {differ[0]}" if differ else f"are both for {one.mpp:g} µm/px"
                raise ModelError(
                    f"{self.title}: expected one detector at several resolutions, but {one.path.name} and "
                    f"{other.path.name} {said}; name the one to use"
                )

    @property
    def name(self) -> str:
        """Name of the finest variant."""
        return self.variants[0].name

    @property
    def sha256(self) -> str:
        """Digest of all variants."""
        return hashlib.sha256("".join(variant.sha256 for variant in self.variants).encode()).hexdigest()

    @property
    def classes(self) -> Sequence[str]:
        """Class names, indexed by label."""
        return self.variants[0].classes

    @property
    def attributes(self) -> Sequence[str]:
        """What it says of each object besides its class."""
        return self.variants[0].attributes

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
    def halo_um(self) -> float | None:
        """Margin a tile of the finest variant needs, µm."""
        return self.variants[0].halo_um

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
