"""YOLO26 and YOLOv10 through ultralytics, which is AGPL-3.0: imported here alone, and for a name that asks for it.

Hides that package: how its networks are built and made ready, and how it is kept from the network, the home directory
and the terminal. A directory holds ``model.yaml`` (ultralytics' description of the network), ``model.safetensors`` and
``slidescan.json``; `convert_yolo` writes it from a ``.pt``. Invariants:

- Nothing in a directory is run: ultralytics evaluates an ``activation`` and calls whatever a layer's name stands for,
  so both are checked before it sees them.
- Only heads that end in boxes by themselves are taken: where overlapping boxes are suppressed afterwards, a result
  would depend on two thresholds more, and crowded cells are lost.
- Tiles are scored as they are, neither resized nor letterboxed. Weights and boxes are float32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import yaml

from slidescan.detect.card import Card, write_card
from slidescan.detect.model import Model
from slidescan.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from slidescan.detect.network import Forward

__all__ = ["Yolo", "convert_yolo", "import_ultralytics"]

_INSTALL = 'pip install "slidescan[ultralytics]" (AGPL-3.0)'
_MOST = 300  # boxes a tile: ultralytics' own
_TRAINED_PX = 640  # edge of the images it is trained on, where nothing says so
_GREY = 114 / 255  # what ultralytics fills images up with in training
_LAYER = re.compile(r"(nn\.)?[A-Za-z]\w*")
_ARGUMENT = r"(?:[a-z_]+=)?(?:True|False|None|-?[\d.]+(?:e-?\d+)?)"
_ACTIVATION = re.compile(rf"(torch\.)?nn\.[A-Z]\w*\(({_ARGUMENT}(, ?{_ARGUMENT})*)?\)")
# No look-up of its servers, nothing on the terminal, no package installed on the fly, checkpoints without code.
_TAME = {
    "YOLO_OFFLINE": "true",
    "YOLO_VERBOSE": "false",
    "YOLO_AUTOINSTALL": "false",
    "ULTRALYTICS_SAFE_LOAD": "true",
}


class Yolo(Model):
    """A YOLO of ultralytics, of one resolution; parameters are those of `Model`."""

    files: ClassVar[tuple[str, ...]] = ("model.yaml", "model.safetensors", "slidescan.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self._config["num_labels"]
        if len(self.classes) != count:
            raise ModelError(
                f"{self.path.name}/slidescan.json: expected the {count} classes of model.yaml, got {len(self.classes)}"
            )
        _require()

    @property
    def runs_on(self) -> str:
        """Device and precision, and the version of ultralytics, since what a description means has changed with it."""
        return f"{super().runs_on}, ultralytics {importlib.metadata.version('ultralytics')}"

    def _read_config(self) -> dict[str, Any]:
        where = f"{self.path.name}/model.yaml"
        try:
            table = yaml.safe_load((self.path / "model.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
            raise ModelError(f"{where}: expected a YAML file, cannot read it ({exc})") from exc
        classes = _check(table, where)
        if not (self.path / "model.safetensors").is_file():
            raise ModelError(
                f"{self.path.name}: expected model.safetensors beside model.yaml, found none; pickled weights are not "
                "read, convert them with pipelines/convert_ultralytics.py"
            )
        # In the words of transformers, which `Model` knows.
        return {"model_type": "yolo", "num_labels": classes, "num_queries": _MOST, "architecture": table}

    def _load(self, device: str, precision: Literal["fp32", "bf16"]) -> Forward:
        import safetensors
        import safetensors.torch

        tasks = import_ultralytics()
        try:
            tensors = safetensors.torch.load_file(self.path / "model.safetensors")
        except (OSError, safetensors.SafetensorError) as exc:
            raise ModelError(f"{self.path.name}: cannot load the weights: {exc}") from exc
        network = _build(tasks, self._config["architecture"], tensors, self.path.name)
        return _Boxes(network, device, self._card.temperature, self._card.offset)


class _Boxes:
    """An ultralytics network made ready for tiles; it is changed in place (fused, moved)."""

    def __init__(self, network: Any, device: str, temperature: float, offset: float) -> None:
        from slidescan.detect.surgery import channels_last

        self._stride = int(network.stride.max())
        self._temperature, self._offset = temperature, offset
        network.fuse(verbose=False)  # folds normalisation, and drops the branch that is for training only
        self._network: Any = channels_last(network.to(device))
        self._alone = threading.Lock()

    def __call__(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        import torch
        from torch.nn import functional

        pixels = tiles.permute(0, 3, 1, 2).float().div_(255)
        below, right = (-side % self._stride for side in pixels.shape[2:])
        if below or right:  # a network with a level of stride 64 px
            pixels = functional.pad(pixels, (0, right, 0, below), value=_GREY)
        with self._alone:  # its head keeps the grid of the last tile's size
            low_xy, high_xy, score, label = self._network(pixels)[0].split((2, 2, 1, 1), -1)
        if (self._temperature, self._offset) != (1.0, 0.0):
            score = (score.logit() / self._temperature + self._offset).sigmoid()
        # YOLO26's edges are plain numbers, so a left one may lie at the right of the right one.
        xyxy = torch.cat((low_xy.minimum(high_xy), low_xy.maximum(high_xy)), -1)
        return score[..., 0], label[..., 0].long(), xyxy, xyxy[..., :0]


def convert_yolo(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    mpp: float,
    object_um: float = 15.0,
    threshold: float = 0.5,
) -> Yolo:
    """Write a model directory from the weights of an ultralytics YOLO.

    Weights keep their precision (a finished training leaves float16). The file is opened so that it rebuilds known
    layers and runs no code of its own; all the same, it is a pickle: convert only files you trust.

    Parameters
    ----------
    source : str or path
        A ``.pt`` of YOLO26 or YOLOv10; or a ``.yaml``, in a directory or one that ultralytics ships, for random
        weights.
    directory : str or path
        Its name becomes the model's; ``ultralytics:`` before it is the name for `load_detector`.
    mpp : float
        µm/px the model was trained at; 1 for photographs, where a px is the unit.
    object_um : float
        Edge of the largest object, µm.
    threshold : float
        Operating score.

    Returns
    -------
    Yolo

    Raises
    ------
    ModelError
        If the file is no such model, or this version of ultralytics builds another network from its description.
    MissingExtraError
        If ultralytics is not installed.

    Examples
    --------
    >>> convert_yolo("best.pt", "models/my-yolo", mpp=0.25).mpp  # doctest: +SKIP
    0.25
    """
    import safetensors.torch

    path, out = Path(source), Path(directory)
    if not min(mpp, object_um) > 0 or not 0 <= threshold <= 1:
        raise ModelError(
            f"{path.name}: expected mpp and object_um above 0 and a threshold from 0 to 1, got {mpp}, {object_um} and "
            f"{threshold}"
        )
    _require()
    tasks = import_ultralytics()
    original, names, trained_px = _read(tasks, path)
    architecture = {key: value for key, value in original.yaml.items() if key != "yaml_file"}  # names a person's folder
    if _check(architecture, path.name) != len(names):
        raise ModelError(f"{path.name}: expected {architecture['nc']} class names, got {len(names)}; train it again")
    tensors = {key: tensor.contiguous() for key, tensor in original.state_dict().items()}
    _compare(_build(tasks, architecture, tensors, path.name), original, path.name)
    input_px = -(-trained_px // 32) * 32
    card = Card(out.resolve().name, names, mpp, input_px=input_px, object_um=object_um, threshold=threshold)
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(architecture, sort_keys=False, default_flow_style=None)
    (out / "model.yaml").write_text(text, encoding="utf-8")
    # Not save_file, whose files none but their owner may read.
    (out / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    write_card(card, out)
    return Yolo(out.resolve())


def _read(tasks: Any, path: Path) -> tuple[Any, tuple[str, ...], int]:
    """Return the network of a checkpoint, or a random one of a description, its class names and the px it knows."""
    try:
        if path.suffix in (".yaml", ".yml"):
            described = tasks.yaml_model_load(path)
            _check(described, path.name)
            network, settings = _build(tasks, described, None, path.name), {}
        elif path.suffix == ".pt" and path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                # It changes some names, and looks for a file it does not find on its servers.
                link = Path(folder) / "weights.pt"
                link.symlink_to(path.resolve())
                checkpoint = tasks.torch_safe_load(link, safe_only=True)[0]
            network, settings = checkpoint.get("ema") or checkpoint["model"], checkpoint.get("train_args", {})
            if not isinstance(network, tasks.DetectionModel):
                raise TypeError(f"it holds a {type(network).__name__}")
        else:
            raise FileNotFoundError("no such .pt or .yaml file")
        px = settings.get("imgsz", _TRAINED_PX)
        names = tuple(str(network.names[label]) for label in range(len(network.names)))
        return network, names, max(px) if isinstance(px, list | tuple) else int(px)
    except ModelError:
        raise
    except Exception as exc:  # what it raises depends on what is wrong with the file
        raise ModelError(f"{path}: expected a detection model of ultralytics, cannot read it: {_first(exc)}") from exc


def _compare(rebuilt: Any, original: Any, name: str) -> None:
    """Refuse a network whose description makes another one of its weights: what some layers mean has changed."""
    import torch

    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    try:
        # In one order in memory the two add up in one order, too, and no two boxes change places.
        original.float().to(memory_format=torch.contiguous_format).eval().end2end = True
        with torch.inference_mode():
            found, expected = (network(image)[0] for network in (rebuilt, original))
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-3, equal_nan=True):
            raise ValueError("it finds something else")
    except Exception as exc:  # a network of another version can fail in any way
        raise ModelError(
            f"{name}: expected ultralytics {importlib.metadata.version('ultralytics')} to rebuild the network from its "
            f"description, got another ({_first(exc)}); convert it with the version that trained it"
        ) from exc


def _check(table: Any, where: str) -> int:
    """Refuse a description that could do anything but build a network that ends in boxes; return the class count."""
    try:
        rows = [*table["backbone"], *table["head"]]
        layers = [layer for _, _, layer, _ in rows]
        head, arguments, classes = layers[-1], rows[-1][3], table["nc"]
        if not isinstance(classes, int) or classes < 1 or arguments not in (["nc"], [classes]):
            raise ValueError("nc must be the number of classes, and what the head is given")
        if table.get("channels", table.get("ch", 3)) != 3:
            raise ValueError("channels must be the 3 of RGB")
        # TorchVision downloads weights.
        wrong = [layer for layer in layers if not _LAYER.fullmatch(layer) or layer == "TorchVision"]
        if wrong or not _ACTIVATION.fullmatch(table.get("activation") or "nn.SiLU()"):
            raise ValueError(f"{(wrong or [table['activation']])[0]} is no layer of a network")
    except (AttributeError, LookupError, TypeError, ValueError) as exc:
        raise ModelError(
            f"{where}: expected the description of an ultralytics network, with nc, backbone and head of rows "
            f"[from, repeats, layer, arguments]: {_first(exc)}"
        ) from exc
    if head != "v10Detect" and not (head == "Detect" and table.get("end2end")):
        raise ModelError(
            f"{where}: expected a YOLO whose head ends in boxes (YOLO26 or YOLOv10), found {head}"
            f"{' without end2end' if head == 'Detect' else ''}; choose or train one of these for detection"
        )
    return int(classes)


def _build(tasks: Any, architecture: dict[str, Any], tensors: dict[str, Tensor] | None, name: str) -> Any:
    """Build the network of a checked description, in evaluation mode, with these weights or random ones."""
    import torch
    from torch import nn

    for row in (*architecture["backbone"], *architecture["head"]):
        layer = getattr(nn, row[2][3:], None) if row[2].startswith("nn.") else getattr(tasks, row[2], None)
        home = layer.__module__ if isinstance(layer, type) else ""
        if not home.startswith(("torch.nn.modules.", "ultralytics.nn.modules.")):
            raise ModelError(
                f"{name}: expected layers that ultralytics {importlib.metadata.version('ultralytics')} has, found "
                f"{row[2]}; install the version that the model was trained with"
            )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = tasks.DetectionModel(dict(architecture), ch=3, verbose=False)
    except Exception as exc:  # what it raises depends on what is wrong with the description
        raise ModelError(f"{name}: cannot build the network that model.yaml describes: {_first(exc)}") from exc
    if tensors is not None:
        own = network.state_dict()
        shapes, wanted = ({key: tuple(t.shape) for key, t in state.items()} for state in (tensors, own))
        wrong = sorted({key for key, _ in shapes.items() ^ wanted.items()})
        if wrong:
            raise ModelError(
                f"{name}: expected weights that fit model.yaml; {len(wrong)} entries do not, such as {wrong[0]}"
            )
        network.load_state_dict(tensors)
    network.eval()
    network.end2end = True
    network.model[-1].max_det = _MOST
    return network


def _first(exc: BaseException) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(exc).strip().splitlines()), type(exc).__name__)


def _require() -> None:
    """Say early, before a scan has read a slide, that the package is not there; nothing is imported."""
    if importlib.util.find_spec("ultralytics") is None:
        raise MissingExtraError(f"ultralytics: needed for a model named ultralytics:DIR, not installed; {_INSTALL}")


def import_ultralytics() -> Any:
    """Import ultralytics' networks, and leave the process as it was.

    On import the package asks the network whether it is online, writes a settings file to the home directory and says
    so, sets OMP_NUM_THREADS to 1 for every process started later, and changes how numpy and torch print and save. Where
    somebody has imported it before, it is used as it is.
    """
    if "ultralytics" not in sys.modules:
        import torch

        before, patched = dict(os.environ), (torch.load, torch.save)
        with tempfile.TemporaryDirectory() as settings, np.printoptions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.environ.update(_TAME, YOLO_CONFIG_DIR=settings)
            try:
                importlib.import_module("ultralytics.nn.tasks")
            except (ImportError, OSError, RuntimeError) as exc:
                raise MissingExtraError(f"ultralytics: cannot be imported ({_first(exc)}); {_INSTALL}") from exc
            finally:
                for key in os.environ.keys() - before.keys():
                    del os.environ[key]
                os.environ.update(before)
                torch.load, torch.save = patched
                torch.set_printoptions(profile="default")  # type: ignore[no-untyped-call]
    from ultralytics.nn import tasks

    return tasks
