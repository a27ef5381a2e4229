"""A network in memory: tiles of any memory order, batches that fit, and what it computes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slidescan.detect import load_detector
from slidescan.detect.device import resolve
from slidescan.detect.network import Network


@pytest.mark.parametrize("way", ["planes first", "Fortran", "turned", "every other", "read-only"])
def test_tiles_may_lie_in_memory_in_any_way(tiny: Path, way: str) -> None:
    """A view gives what its copy gives."""
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    view = {
        "planes first": np.moveaxis(np.ascontiguousarray(np.moveaxis(tiles, -1, 1)), 1, -1),
        "Fortran": np.asfortranarray(tiles),
        "turned": np.ascontiguousarray(tiles.swapaxes(1, 2)).swapaxes(1, 2),
        "every other": np.repeat(tiles, 2, axis=3)[..., ::2],
        "read-only": tiles.copy(),
    }[way]
    view.flags.writeable = False
    assert (view == tiles).all()
    for one, other in zip(load_detector(tiny).detect(view, 0.0), load_detector(tiny).detect(tiles, 0.0), strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.score, other.score)


def test_where_there_is_no_room_for_a_batch_it_is_halved() -> None:
    """Until it fits, for good, and every tile is scored once; where not even one fits it is an error."""
    seen: list[int] = []

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(len(pixels))
        if len(pixels) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        score = pixels.float().mean((1, 2, 3))[:, None] / 255
        return (
            score,
            torch.zeros_like(score, dtype=torch.long),
            score[..., None].repeat(1, 1, 4),
            score[..., None][..., :0],
        )

    network = Network(forward, name="tight", device="cpu")
    network._batch, room = 8, 2
    tiles = np.arange(11, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    found = network.detect(tiles, 0.0)
    np.testing.assert_allclose([each.score[0] * 255 for each in found], np.arange(11), atol=1e-5)
    assert seen == [8, 4, 2, 2, 2, 2, 2, 2]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        network.detect(tiles, 0.0)


@pytest.mark.parametrize("said", ["CUDA error: unspecified launch failure", "[enforce fail] not enough memory"])
def test_what_a_device_says_is_not_taken_for_a_fault_of_the_model(said: str) -> None:
    """An archive tries the slide in another process then."""

    def forward(_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said.split()[-1]):
        Network(forward, name="x", device="cpu").detect(np.zeros((1, 32, 32, 3), np.uint8), 0.5)


@pytest.mark.parametrize(
    ("capability", "kind", "expected"), [(8, "d_fine", "bf16"), (7, "d_fine", "fp32"), (9, "detr", "fp32")]
)
def test_a_gpu_takes_bf16_where_both_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: int, kind: str, expected: str
) -> None:
    """`auto` on a GPU: neither a model that cannot, nor a GPU from before Ampere."""
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (capability, 5))
    stand_in = SimpleNamespace(cuda=gpu, empty=lambda *size, device: None, device=torch.device)
    monkeypatch.setattr("slidescan.detect.device.torch", stand_in)
    assert resolve("model", kind, None, "auto") == ("cuda", expected)
