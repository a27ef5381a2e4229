"""What a result says about how it came to be; an allow-list, so that nothing which names a patient can slip in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import resource
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ConfigError
from slidescan.geometry import Frame
from slidescan.slides import Slide, open_slide

__all__ = ["as_scanned", "describe_slide", "peak_gpu_mb", "peak_rss_mb", "run_key", "versions"]


def run_key(slide: Slide, detector: Detector, config: ScanConfig) -> str:
    """Name the scan by everything its detections depend on."""
    identity = [
        importlib.metadata.version("slidescan"),
        slide.fingerprint,
        slide.frame.mpp,
        slide.color,
        slide.backend,
        detector.sha256,
        detector.mpp,
        detector.runs_on,
    ]
    text = json.dumps([*identity, config.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def as_scanned(slide: Slide | str | Path, fingerprint: str, frame: Frame, what: str = "slide") -> Slide:
    """Return the slide of a result, a path opened at its scale; refuse another slide, and one at another scale.

    Raises
    ------
    ConfigError
        Beginning with `what`, the name of what was given.
    SlideError
        If it cannot be opened.
    """
    slide = slide if isinstance(slide, Slide) else open_slide(slide, mpp=frame.mpp)
    if slide.fingerprint != fingerprint:
        raise ConfigError(  # without the file's name: a reviewer who knows the slide by another reads it
            f"{what}: expected the slide that was scanned, got one of other content; give the file that was scanned"
        )
    if slide.frame != frame:
        raise ConfigError(
            f"{what}: expected {frame.mpp:g} µm/px, as it was scanned, got {slide.frame.mpp:g}; open it with "
            f"mpp={frame.mpp!r}"
        )
    return slide


def describe_slide(slide: Slide) -> dict[str, Any]:
    """Return what may be told of a slide: structure and scale, nothing that names a patient."""
    return {
        "fingerprint": slide.fingerprint,
        "size_wh": list(slide.size_wh),
        "mpp": slide.frame.mpp,
        "mpp_source": slide.mpp_source,
        "backend": slide.backend,
        "color": slide.color,
        "levels": [list(level.size_wh) for level in slide.levels],
        "bounds_l0": None if slide.bounds_l0 is None else list(astuple(slide.bounds_l0)),
    }


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    packages = (
        "slidescan",
        "torch",
        "transformers",
        "numpy",
        "tifffile",
        "imagecodecs",
        "openslide-bin",
        "zarr",
        "dask",
    )
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def peak_gpu_mb() -> int | None:
    """Return the most GPU memory torch held in this process so far, MB; None without a GPU in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 1e6)


def peak_rss_mb() -> int:
    """Return this process's highest memory so far, MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak includes that of the process that started this one.
        peak_kb = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak_kb) // 1000
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # macOS counts bytes
