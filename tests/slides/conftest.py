"""One synthetic pyramid, written losslessly in every format a test can write."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray

from slidescan.slides import Slide, memory_slide, open_slide

MPP = 0.25  # µm/px of the synthetic slide
BACKENDS = ["memory", "tiff", "ome-tiff", "openslide", "ngff-0.4", "ngff-0.5"]


@pytest.fixture(scope="session")
def levels() -> list[NDArray[np.uint8]]:
    """Three levels of 701 × 501 px whose sizes are floored, as scanners do; level k holds its own pixels."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (63, 88, 3), np.uint8).repeat(8, 0).repeat(8, 1)[:501, :701]
    noise = rng.integers(0, 40, coarse.shape, np.uint8)
    level0 = (coarse // 2 + noise).astype(np.uint8)
    return [level0, *(level0[: 501 // f * f : f, : 701 // f * f : f].copy() for f in (2, 4))]


@pytest.fixture(scope="session")
def write_tiff() -> Callable[..., Path]:
    """Write levels as a plain tiled pyramid, or as OME-TIFF with SubIFDs."""

    def write(
        path: Path, levels: list[NDArray[np.uint8]], *, ome: bool = False, mpp: float = MPP, **more: object
    ) -> Path:
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", **more}
        with tifffile.TiffWriter(path, ome=ome) as writer:
            if ome:
                scale = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                writer.write(levels[0], subifds=len(levels) - 1, metadata=scale, **options)
            else:
                grid = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
                writer.write(levels[0], metadata=None, **grid, **options)
            for pixels in levels[1:]:
                writer.write(pixels, subfiletype=1, metadata=None, **options)
        return path

    return write


@pytest.fixture(scope="session")
def write_ngff() -> Callable[..., Path]:
    """Write levels as OME-NGFF 0.4 or 0.5 with axes (c, y, x), or sharded."""

    def write(
        path: Path, levels: list[NDArray[np.uint8]], version: str, *, sharded: bool = False, **options: object
    ) -> Path:
        v3 = version == "0.5"
        group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
        axes = [{"name": "c", "type": "channel"}]
        axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
        datasets = []
        for i, pixels in enumerate(levels):
            more = options | ({"dimension_names": ["c", "y", "x"]} if v3 else {})
            if not v3:
                more["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
            if sharded:
                more["shards"] = (3, 256, 256)
            data = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            array = group.create_array(str(i), shape=data.shape, chunks=(1, 128, 128), dtype="uint8", **more)
            array[...] = data
            scale = [1.0, MPP * 2**i, MPP * 2**i]
            datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        told = [{"version": version, "axes": axes, "datasets": datasets}]
        group.attrs.update({"ome": {"version": "0.5", "multiscales": told}} if v3 else {"multiscales": told})
        return path

    return write


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    levels: list[NDArray[np.uint8]],
    write_tiff: Callable[..., Path],
    write_ngff: Callable[..., Path],
) -> dict[str, Path]:
    """The synthetic slide's path by format."""
    root = tmp_path_factory.mktemp("slides")
    plain = write_tiff(root / "plain.tiff", levels)
    return {
        "tiff": plain,
        "openslide": plain,
        "ome-tiff": write_tiff(root / "case.ome.tiff", levels, ome=True),
        "ngff-0.4": write_ngff(root / "four.ome.zarr", levels, "0.4"),
        "ngff-0.5": write_ngff(root / "five.ome.zarr", levels, "0.5"),
    }


@pytest.fixture(scope="session")
def open_as(files: dict[str, Path], levels: list[NDArray[np.uint8]]) -> Callable[[str], Slide]:
    """Open the synthetic slide through one of `BACKENDS`."""

    def open_(kind: str) -> Slide:
        if kind == "memory":
            return memory_slide(levels, MPP)
        return open_slide(files[kind], backend="openslide" if kind == "openslide" else "auto")

    return open_


@pytest.fixture(params=BACKENDS)
def slide(request: pytest.FixtureRequest, open_as: Callable[[str], Slide]) -> Slide:
    """The synthetic slide through each backend in turn."""
    return open_as(request.param)


@pytest.fixture(scope="session")
def raw_tiff() -> Callable[..., bytes]:
    """Build a one-directory little-endian TIFF from tag numbers (all LONG), for sizes no writer would write."""

    def build(tags: dict[int, int | list[int] | bytes], data: bytes = b"") -> bytes:
        start = 8 + len(data)
        extra, entries = b"", b""
        extra_at = start + 2 + 12 * len(tags) + 4
        for tag, value in sorted(tags.items()):
            kind, items = (7, value) if isinstance(value, bytes) else (4, value if isinstance(value, list) else [value])
            packed = items if isinstance(items, bytes) else struct.pack(f"<{len(items)}I", *items)
            if len(packed) > 4:
                entries += struct.pack("<HHII", tag, kind, len(items), extra_at + len(extra))
                extra += packed + b"\0" * (len(packed) % 2)
            else:
                entries += struct.pack("<HHI", tag, kind, len(items)) + packed.ljust(4, b"\0")
        head = struct.pack("<2sHI", b"II", 42, start) + data
        return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + extra

    return build
