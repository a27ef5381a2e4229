"""Finding a detector by name, directory or Hugging Face id.

Hides names and directories. A directory of model directories (see `slidescan.detect.card`) is a family: one detector at
several resolutions.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Literal, SupportsFloat

from slidescan.detect.card import MODEL_FILES, SHARDS, title
from slidescan.detect.model import Family, Model, Precision
from slidescan.detect.yolo import Yolo
from slidescan.errors import ModelError

__all__ = ["load_detector"]

_BUNDLED = Path(__file__).parent / "models"
_TRAINED = ("model.safetensors", "slidescan.json")  # what a training has put there before the configuration
_ULTRALYTICS = "ultralytics:"
_MOST_NAME = 80  # characters of a name that cannot be one
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_detector(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Precision = "auto",
    mpp: float | Literal["px"] | None = None,
) -> Model | Family:
    """Find a detector; its weights are loaded with its first tile.

    Looked for in this order: a directory, a bundled name (``mitosis``), a Hugging Face id (``owner/name``: fetched or
    taken from the local cache, safetensors only). ``ultralytics:DIR`` is a directory that `convert_yolo` wrote; it is
    the one name that makes the ultralytics package, which is AGPL-3.0, be imported.

    Parameters
    ----------
    name_or_path : str or path
    device : str, optional
        Such as ``cpu`` or ``cuda:1``; None takes a GPU if there is one.
    precision : {"auto", "fp32", "bf16"}
        Of the convolutions. auto is bf16 for a D-FINE or RT-DETR on a GPU that has it, and fp32 otherwise.
    mpp : float or "px", optional
        µm/px the model was trained at, for a directory without ``slidescan.json``; "px" where pictures are to be read
        as they are.

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
    mpp = mpp if mpp is None or mpp == "px" else _above_0(mpp)
    if not isinstance(name_or_path, str | os.PathLike):
        raise ModelError(f"model: expected a name or a directory, got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    if not name:
        raise ModelError("model: expected a name or a directory, got an empty text; . is the directory you are in")
    kind: type[Model] = Yolo if name.startswith(_ULTRALYTICS) else Model
    try:
        return _found(name, kind, device, precision, mpp)
    except OSError as exc:
        why = exc.strerror or type(exc).__name__
        raise ModelError(f"{name[:_MOST_NAME]}: expected a model directory, cannot read it ({why})") from exc


def _above_0(mpp: object) -> float:
    number = float(mpp) if isinstance(mpp, SupportsFloat) and not isinstance(mpp, bool) else math.nan
    if not 0 < number < math.inf:
        raise ModelError(f"mpp: expected µm/px above 0, or px, got {mpp!r}")
    return number


def _found(
    name: str, kind: type[Model], device: str | None, precision: Precision, mpp: float | Literal["px"] | None
) -> Model | Family:
    path = Path(name.removeprefix(_ULTRALYTICS))
    if path.suffix == ".pt" and not path.is_dir():
        raise ModelError(
            f"{path}: expected a model directory, got pickled weights, which are not read; convert a YOLO once with "
            f"python pipelines/convert_ultralytics.py {path} -o DIR --mpp …, then write {_ULTRALYTICS}DIR"
        )
    if not path.is_dir():
        path = _elsewhere(name)
    directories = [path, *sorted(sub for sub in path.iterdir() if os.access(sub, os.R_OK | os.X_OK))]
    if (path / kind.files[0]).is_file():
        return kind(path.resolve(), device, precision, mpp)
    below = [sub for sub in directories if (sub / kind.files[0]).is_file()]
    trained = [sub for sub in directories if all((sub / name).is_file() for name in _TRAINED)]
    if kind is Model and (unfinished := set(trained) - set(below)):  # another variant would be taken in its place
        one = min(unfinished).name
        raise ModelError(f"{one}: expected {kind.files[0]} beside its weights, found none; run its training again")
    try:
        models = [kind(sub.resolve(), device, precision, mpp) for sub in below]
    except ModelError as exc:
        raise ModelError(f"{name}: of those below it, {exc}") from exc
    if models:
        return Family(title(path.resolve()), tuple(sorted(models, key=lambda model: model.mpp)))
    if kind is Model and any((sub / Yolo.files[0]).is_file() for sub in directories):
        raise ModelError(
            f"{name}: expected a model of transformers, found one of ultralytics; write {_ULTRALYTICS}{name} to load "
            "it with that package, which is AGPL-3.0"
        )
    raise ModelError(
        f"{name}: expected {kind.files[0]} and model.safetensors, or sub-directories that hold them, found neither"
    )


def _elsewhere(name: str) -> Path:
    """Return the directory of a model that is bundled or on the hub."""
    bundled = _BUNDLED / name
    if Path(name).name == name and bundled.is_dir():
        return bundled
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return _from_hub(name)
    known = ", ".join(sorted(p.name for p in _BUNDLED.iterdir() if p.is_dir()))
    raise ModelError(
        f"{name}: expected a model directory, a bundled name ({known}), a Hugging Face id (owner/name) or "
        f"{_ULTRALYTICS}DIR, found none"
    )


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [name for file in (*MODEL_FILES, SHARDS) for name in (file, f"*/{file}")]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except MemoryError:
        raise
    except Exception as exc:  # its own errors, and those of its HTTP library, which has been changed
        raise ModelError(
            f"{repository}: expected a directory or a model on the Hugging Face hub, cannot fetch it "
            f"({type(exc).__name__}); check the name and the connection"
        ) from exc
