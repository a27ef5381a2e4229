"""What single cells look like: procedural haematoxylin-and-eosin sprites.

Hides how a nucleus, a mitotic figure or its look-alike is drawn. Everything is a concentration of two stains, so
overlaps darken as dyes do (Beer-Lambert). Sizes are µm and follow what the MIDOG crops show.

Invariant: a sprite has an even edge and its subject is centred on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.special import expit

__all__ = ["DRAW", "FIGURES", "LOOK_ALIKES", "MASTER_MPP", "VARIANTS", "Sprite", "noise"]

F32 = NDArray[np.float32]

MASTER_MPP = 0.25  # µm/px shapes are drawn at: a 40× scanner
VARIANTS = 20  # sprites a kind; with 8 mirrored and turned copies no repeat is seen in one field
FIGURES = ("metaphase", "prometaphase", "anaphase", "telophase")
LOOK_ALIKES = ("pyknotic", "dark_lymphocyte", "hyperchromatic", "pigment", "smear")
_BLUR_UM = 0.16  # optical blur: half the Abbe limit of a 0.75 NA objective at 0.5 µm light
_BROWN_OD = np.array([0.75, 1.25, 1.75], np.float32)  # RGB optical density of melanin- or haemosiderin-like grains


@dataclass(frozen=True, slots=True, eq=False)
class Sprite:
    """One drawn object: stains under it are multiplied by `keep`, then `add` is added.

    `keep` is float32 (n, n), `add` float32 (2, n, n) haematoxylin and eosin, `transmit` float32 (n, n, 3) is the light
    that passes a pigment, or None.
    """

    keep: F32
    add: F32
    transmit: F32 | None = None

    def turned(self, turn: int) -> Sprite:
        """Return one of the 8 mirrored and quarter-turned copies (views, no pixels are copied)."""
        flip = slice(None, None, -1 if turn & 4 else 1)
        keep, add = (np.rot90(a[..., flip], turn & 3, axes=(-2, -1)) for a in (self.keep, self.add))
        light = None if self.transmit is None else np.rot90(self.transmit[:, flip], turn & 3)
        return Sprite(keep, add, light)


def noise(rng: np.random.Generator, n_px: int, um: float | tuple[float, float]) -> F32:
    """Periodic noise of unit variance, correlated over `um` (one length, or one for y and x)."""
    lengths = np.broadcast_to(np.asarray(um, np.float32), 2) / MASTER_MPP
    falloff = [
        np.exp(-2 * (np.pi * sigma * freq) ** 2).astype(np.float32)
        for sigma, freq in zip(lengths, (fft.fftfreq(n_px), fft.rfftfreq(n_px)), strict=True)
    ]
    spectrum = fft.rfft2(rng.standard_normal((n_px, n_px), np.float32)) * falloff[0][:, None] * falloff[1]
    noise = fft.irfft2(spectrum, (n_px, n_px))
    return np.asarray(noise / noise.std(), np.float32)


def _plane(reach_um: float, angle: float = 0.0) -> tuple[F32, F32]:
    """Coordinates (u, v) in µm of a square that reaches `reach_um` from its centre, turned by `angle`."""
    n = 2 * int(np.ceil(reach_um / MASTER_MPP))
    axis = ((np.arange(n) + 0.5 - n / 2) * MASTER_MPP).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    return (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32), (np.cos(angle) * y - np.sin(angle) * x).astype(
        np.float32
    )


def _inside_um(rng: np.random.Generator, u: F32, v: F32, half: tuple[float, float], uneven: float) -> F32:
    """About how deep (µm, negative outside) each point lies in an ellipse whose outline is `uneven`."""
    turn = np.arctan2(v / half[1], u / half[0])
    edge = 1 + sum(
        uneven / k * rng.standard_normal() * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)
    )
    return np.asarray((edge - np.hypot(u / half[0], v / half[1])) * min(half), np.float32)


def _sprite(keep: F32, haem: F32, eosin: F32, blur_um: float = _BLUR_UM, transmit: F32 | None = None) -> Sprite:
    """Blur and fade to the frame, so that no sprite ends in a straight edge."""
    n = len(keep)
    ramp = np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) / (0.08 * n)
    fade = np.clip(np.minimum(ramp[:, None], ramp[None, :]), 0, 1).astype(np.float32)
    planes = [ndimage.gaussian_filter(p * fade, blur_um / MASTER_MPP) for p in (1 - keep, haem, eosin)]
    light = None if transmit is None else np.asarray(1 - (1 - transmit) * fade[..., None], np.float32)
    return Sprite(1 - planes[0], np.stack(planes[1:]), light)


def _nucleus(rng: np.random.Generator, _variant: int) -> Sprite:
    """Tumour nucleus: oval, open chromatin, dark rim, one to three nucleoli, own cytoplasm around."""
    size = rng.uniform(6.5, 10.5)
    half = (size / 2 * rng.uniform(1.0, 1.2), size / 2 * rng.uniform(0.75, 0.95))
    u, v = _plane(8.5, rng.uniform(0, np.pi))
    deep = _inside_um(rng, u, v, half, 0.06)
    body, rim = expit(deep / 0.22), np.exp(-(((deep - 0.35) / 0.4) ** 2))
    n = len(deep)
    clumps = 0.6 * noise(rng, n, 0.45) + 0.5 * noise(rng, n, 0.9)
    nucleoli = np.zeros_like(deep)
    for _ in range(rng.integers(0, 3) + 1):
        pu, pv, r = rng.uniform(-0.45, 0.45) * half[0], rng.uniform(-0.45, 0.45) * half[1], rng.uniform(0.45, 0.8)
        nucleoli += np.exp(-((u - pu) ** 2 + (v - pv) ** 2) / (2 * r * r)).astype(np.float32)
    base = rng.uniform(0.5, 1.0)
    haem = body * np.maximum(base * (1 + 0.3 * clumps), 0.15) + body * (0.5 * rim + 0.75 * np.minimum(nucleoli, 1))
    cell = expit(_inside_um(rng, u, v, (half[0] + 2.4, half[1] + 2.4), 0.1) / 0.8)
    eosin = 0.12 * body + 0.28 * body * np.minimum(nucleoli, 1) + (cell - body).clip(0) * rng.uniform(-0.1, 0.14)
    return _sprite(1 - 0.9 * body, haem, eosin)


def _fibroblast(rng: np.random.Generator, variant: int) -> Sprite:
    """Spindle nucleus of the stroma, `variant` sets its angle."""
    half = (rng.uniform(4.5, 8), rng.uniform(0.9, 1.6))
    u, v = _plane(9.5, variant * np.pi / VARIANTS)
    v = v + np.asarray(rng.uniform(-0.02, 0.02) * u * u, np.float32)
    deep = _inside_um(rng, u, v, half, 0.06)
    body = expit(deep / 0.25)
    haem = body * (
        rng.uniform(0.7, 1.35) * (1 + 0.18 * noise(rng, len(deep), 0.6)) + 0.2 * np.exp(-((deep / 0.4) ** 2))
    )
    return _sprite(1 - 0.8 * body, haem, 0.25 * body)


def _round_dark(
    rng: np.random.Generator, size_um: tuple[float, float], dark: tuple[float, float], blur_um: float
) -> Sprite:
    """Small round nucleus of coarse dark chromatin with a thin clear rim of cytoplasm: a lymphocyte."""
    half = rng.uniform(*size_um) / 2
    u, v = _plane(half + 3.0, rng.uniform(0, np.pi))
    deep = _inside_um(rng, u, v, (half, half * rng.uniform(0.86, 1)), 0.04)
    body, cell = expit(deep / 0.25), expit((deep + 0.9) / 0.3)
    haem = body * rng.uniform(*dark) * (1 + 0.22 * noise(rng, len(deep), 0.6)) + 0.06 * cell
    return _sprite(1 - 0.9 * cell, np.maximum(haem, 0), 0.2 * cell, blur_um)


def _red_cell(rng: np.random.Generator, _variant: int) -> Sprite:
    """Erythrocyte: a bright eosin disc without nucleus."""
    u, v = _plane(5.0, rng.uniform(0, np.pi))
    deep = _inside_um(rng, u, v, (rng.uniform(2.8, 3.6), rng.uniform(2.2, 3.2)), 0.05)
    body = expit(deep / 0.25)
    return _sprite(1 - 0.9 * body, 0.02 * body, body * rng.uniform(0.95, 1.3))


# --- mitotic figures ------------------------------------------------------------------------------


def _figure(rng: np.random.Generator, outline: F32, cell: F32, dark: float) -> Sprite:
    """Clumped chromatin without membrane in cleared, granular cytoplasm, from depth maps in µm."""
    n = len(outline)
    ragged = outline + 0.42 * noise(rng, n, 0.32) + 0.3 * noise(rng, n, 0.75) - 0.1
    solid = expit(ragged / 0.16)
    solid *= expit((outline + 1.5) / 0.2)  # loose chromatin stays near its clump
    total = float(solid.sum())
    shift = [round(n / 2 - 0.5 - float((solid.sum(1 - axis) * np.arange(n)).sum()) / total) for axis in (0, 1)]
    solid, cell = (np.roll(p, shift, (0, 1)) for p in (solid, cell))
    body, membrane = expit(cell / 0.5), np.exp(-(((cell - 0.2) / 0.6) ** 2))
    grains = np.maximum(0, 1 + 0.35 * noise(rng, n, 0.4))
    haem = solid * dark * (1 + 0.1 * noise(rng, n, 0.7)) + body * rng.uniform(0.05, 0.16) * grains
    eosin = body * (rng.uniform(0.1, 0.26) * grains + rng.uniform(0.08, 0.24) * membrane) + 0.25 * solid
    return _sprite(1 - 0.93 * body, haem, eosin)


def _chunks(
    rng: np.random.Generator, u: F32, v: F32, ends: tuple[tuple[float, float], tuple[float, float]], half_um: float
) -> F32:
    """Depth (µm) in a bar drawn as overlapping lumps between two points, so that no edge is straight."""
    (u0, v0), (u1, v1) = ends
    depth = np.full(np.broadcast_shapes(u.shape, v.shape), -99, np.float32)
    for t in np.linspace(0, 1, max(3, round(np.hypot(u1 - u0, v1 - v0) / 0.9))):
        cu, cv = u0 + t * (u1 - u0) + rng.normal(0, 0.2), v0 + t * (v1 - v0) + rng.normal(0, 0.28)
        depth = np.maximum(depth, half_um * rng.uniform(0.75, 1.2) - np.hypot(u - cu, v - cv))
    return depth


def _metaphase(rng: np.random.Generator, _variant: int) -> Sprite:
    """Plate seen from the side: one dark bar, fuzzy and a little bent."""
    u, v = _plane(12.0, rng.uniform(0, np.pi))
    cell = _inside_um(rng, u, v, (rng.uniform(6.4, 8.6), rng.uniform(6, 8)), 0.06)
    half = rng.uniform(3.2, 4.9)
    bent = np.asarray(v + rng.uniform(-0.03, 0.03) * u * u, np.float32)
    return _figure(
        rng, _chunks(rng, u, bent, ((-half, 0), (half, 0)), rng.uniform(1.15, 1.7)), cell, rng.uniform(1.8, 2.9)
    )


def _prometaphase(rng: np.random.Generator, _variant: int) -> Sprite:
    """Irregular clump or broken ring of chromosomes with arms sticking out."""
    u, v = _plane(12.0, rng.uniform(0, np.pi))
    cell = _inside_um(rng, u, v, (rng.uniform(6.4, 8.6), rng.uniform(6, 8)), 0.06)
    depth = np.full_like(cell, -99)
    ring = rng.uniform(0.2, 0.85)
    for _ in range(rng.integers(11, 20)):
        far, turn = rng.uniform(ring, 1) * rng.uniform(2.6, 3.8), rng.uniform(0, 2 * np.pi)
        cu, cv = far * np.cos(turn), 0.85 * far * np.sin(turn)
        depth = np.maximum(depth, rng.uniform(0.65, 1.25) - np.hypot(u - cu, v - cv))
    for turn in rng.uniform(0, 2 * np.pi, rng.integers(3, 8)):
        start, end = rng.uniform(1.5, 2.6), rng.uniform(4.0, 5.2)
        arm = ((start * np.cos(turn), start * np.sin(turn)), (end * np.cos(turn + 0.2), end * np.sin(turn + 0.2)))
        depth = np.maximum(depth, _chunks(rng, u, v, arm, 0.45))
    return _figure(rng, depth, cell, rng.uniform(1.9, 2.7))


def _two_plates(
    rng: np.random.Generator, apart_um: float, half_um: float, thick_um: float, cell: F32, u: F32, v: F32
) -> Sprite:
    """Two parallel plates, each bowed away from the other."""
    bow = rng.uniform(0.0, 0.035)
    depth = np.maximum(
        *(
            _chunks(
                rng,
                u,
                np.asarray(v - side * bow * u * u, np.float32),
                ((-half_um, side * apart_um / 2), (half_um, side * apart_um / 2)),
                thick_um,
            )
            for side in (-1, 1)
        )
    )
    return _figure(rng, depth, cell, rng.uniform(1.8, 2.9))


def _anaphase(rng: np.random.Generator, _variant: int) -> Sprite:
    """Two plates on their way to the poles of one cell."""
    u, v = _plane(12.5, rng.uniform(0, np.pi))
    cell = _inside_um(rng, u, v, (rng.uniform(6, 7.5), rng.uniform(7, 8.6)), 0.05)
    return _two_plates(rng, rng.uniform(4.0, 6.2), rng.uniform(2.4, 3.6), rng.uniform(0.9, 1.3), cell, u, v)


def _telophase(rng: np.random.Generator, _variant: int) -> Sprite:
    """Two small plates far apart in a cell that is pinching in two."""
    u, v = _plane(13.5, rng.uniform(0, np.pi))
    apart = rng.uniform(7.2, 9.2)
    halves = [_inside_um(rng, u, np.asarray(v - side * apart / 2, np.float32), (5.2, 4.4), 0.05) for side in (-1, 1)]
    return _two_plates(rng, apart, rng.uniform(1.9, 2.8), rng.uniform(0.85, 1.2), np.maximum(*halves), u, v)


# --- look-alikes ----------------------------------------------------------------------------------


def _pyknotic(rng: np.random.Generator, _variant: int) -> Sprite:
    """Apoptotic cell: smooth round dark balls in shrunken bright-pink cytoplasm with a clear moat."""
    u, v = _plane(9.0, rng.uniform(0, np.pi))
    cell = _inside_um(rng, u, v, (rng.uniform(3.6, 4.8), rng.uniform(3.2, 4.2)), 0.04)
    depth = rng.uniform(1.5, 2.3) - np.hypot(u, v)
    for _ in range(rng.integers(0, 4)):
        far, turn = rng.uniform(1.5, 3.0), rng.uniform(0, 2 * np.pi)
        depth = np.maximum(depth, rng.uniform(0.4, 0.9) - np.hypot(u - far * np.cos(turn), v - far * np.sin(turn)))
    ball, body, moat = expit(depth / 0.12), expit(cell / 0.3), expit((cell + 1.2) / 0.4)
    return _sprite(1 - 0.92 * moat, ball * rng.uniform(2.3, 2.9), body * rng.uniform(0.6, 0.95))


def _hyperchromatic(rng: np.random.Generator, _variant: int) -> Sprite:
    """Long dark nucleus with a smooth outline and an intact membrane."""
    u, v = _plane(9.5, rng.uniform(0, np.pi))
    deep = _inside_um(rng, u, v, (rng.uniform(4.5, 6.5), rng.uniform(1.5, 2.4)), 0.03)
    body = expit(deep / 0.2)
    haem = body * rng.uniform(1.6, 2.2) * (1 + 0.06 * noise(rng, len(deep), 0.8))
    return _sprite(1 - 0.9 * body, haem, 0.3 * body)


def _pigment(rng: np.random.Generator, _variant: int) -> Sprite:
    """Brown grains: melanin, haemosiderin or dirt on the glass."""
    u, v = _plane(7.0)
    depth = np.full(np.broadcast_shapes(u.shape, v.shape), -99, np.float32)
    for _ in range(rng.integers(5, 16)):
        cu, cv = rng.normal(0, 1.7, 2)
        depth = np.maximum(depth, rng.uniform(0.4, 1.4) - np.hypot(u - cu, v - cv))
    dose = ndimage.gaussian_filter(expit(depth / 0.15) * rng.uniform(0.6, 1.2), _BLUR_UM / MASTER_MPP)
    blank = np.zeros_like(depth)
    return _sprite(blank + 1, blank, blank, transmit=np.exp(-dose[..., None] * _BROWN_OD).astype(np.float32))


def _smear(rng: np.random.Generator, _variant: int) -> Sprite:
    """Dark nucleus out of focus or crushed: no edge, no detail."""
    u, v = _plane(12.0, rng.uniform(0, np.pi))
    deep = _inside_um(rng, u, v, (rng.uniform(3.2, 5.2), rng.uniform(1.8, 2.8)), 0.08)
    body = expit(deep / 0.5)
    return _sprite(1 - 0.7 * body, body * rng.uniform(1.7, 2.4), 0.35 * body, blur_um=rng.uniform(0.8, 1.3))


DRAW: dict[str, Callable[[np.random.Generator, int], Sprite]] = {
    "nucleus": _nucleus,
    "fibroblast": _fibroblast,
    "lymphocyte": lambda rng, _k: _round_dark(rng, (5.2, 6.6), (1.2, 1.75), _BLUR_UM),
    "red_cell": _red_cell,
    "metaphase": _metaphase,
    "prometaphase": _prometaphase,
    "anaphase": _anaphase,
    "telophase": _telophase,
    "pyknotic": _pyknotic,
    "dark_lymphocyte": lambda rng, _k: _round_dark(rng, (5.0, 6.8), (1.9, 2.4), 1.5 * _BLUR_UM),
    "hyperchromatic": _hyperchromatic,
    "pigment": _pigment,
    "smear": _smear,
}
