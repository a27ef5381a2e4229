"""The small D-FINE that is trained: its size as a transformers configuration, with random weights, some of them pinned.

1.7 M parameters. Two levels of stride 8 and 16 px see an object of 25 to 50 px over 2 to 6 cells, which is enough
to place it within 2 µm; a third level would serve larger objects than there are. No encoder attention: whether a
nucleus is in mitosis is decided within 20 µm of it, and so its features do not depend on the tile's size. Narrow where
pixels are many: with 96 channels and two layers in the first stages it trains 1.4 times and runs 1.3 times as fast as
with 128 and three, and most of what those cost was spent on stride 4 and 8.

Pinned to zero, and so still a D-FINE to transformers, is whatever would give a tile's place a say: attention between
queries (another nucleus 100 µm away is no reason to doubt this one, and what is said twice is merged afterwards), the
place in the embedding of a query's box, and the shift of its centre that transformers adds to a logit (the same number
moves a box less at a tile's edge than in its middle). What is left moves with the pixels: a tile shifted by a multiple
of 32 px gives the same boxes and scores, but for what its own edge hides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build_network", "pin", "relabel"]


def build_network(
    classes: list[str], attributes: Sequence[str] = (), *, width: float = 1.0, queries: int = 300
) -> nn.Module:
    """Return a D-FINE with random weights for `classes`.

    Parameters
    ----------
    classes : list of str
    attributes : sequence of str
        What else is asked of an object: one more logit each, after those of the classes.
    width : float
        Factor on every channel count; below 1 for tests.
    queries : int
        Cells of a tile that are looked at; an object takes up to ten.

    Examples
    --------
    >>> network = build_network(["mitotic figure"], width=0.25)
    >>> network.config.id2label
    {0: 'mitotic figure'}
    """
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    def wide(*channels: int) -> list[int]:
        return [max(16, int(n * width) // 16 * 16) for n in channels]

    stem, out, mid = wide(16, 32), wide(64, 128, 256), wide(32, 64, 96)
    hidden = wide(96)[0]
    heads = max(1, hidden // 32)  # 32 channels a head: what the op is tuned for
    names = [*classes, *attributes]
    backbone = HGNetV2Config(
        stem_channels=[3, *stem],
        stage_in_channels=[stem[1], *out[:-1]],
        stage_mid_channels=mid,
        stage_out_channels=out,
        stage_num_blocks=[1, 1, 2],
        stage_downsample=[False, True, True],
        stage_downsample_strides=[2, 2, 2],
        stage_light_block=[False, False, False],
        stage_kernel_size=[3, 3, 3],
        stage_numb_of_layers=[2, 2, 3],
        depths=[1, 1, 2],
        hidden_sizes=out,
        embedding_size=stem[1],
        out_indices=[2, 3],
    )
    config = DFineConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # True would freeze random statistics
        encoder_in_channels=out[1:],
        feat_strides=[8, 16],
        encoder_hidden_dim=hidden,
        encoder_layers=0,
        encode_proj_layers=[1],
        encoder_attention_heads=heads,
        encoder_ffn_dim=2 * hidden,
        hidden_expansion=0.5,
        depth_mult=0.34,
        d_model=hidden,
        decoder_in_channels=[hidden, hidden],
        num_feature_levels=2,
        decoder_n_points=[6, 4],
        decoder_layers=3,
        decoder_attention_heads=heads,
        decoder_ffn_dim=2 * hidden,
        num_queries=queries,
        num_denoising=20,
        initializer_bias_prior_prob=0.01,  # most cells show nothing; 1 / (classes + 1) cost the first 25 steps
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    network: Any = DFineForObjectDetection(config)
    with torch.no_grad():
        for parameter, kept in _pinned(network):
            parameter.mul_(kept)
    pin(network)
    return network  # type: ignore[no-any-return]


@torch.no_grad()
def relabel(
    network: nn.Module, classes: Sequence[str], attributes: Sequence[str] = (), *, known_classes: int | None = None
) -> nn.Module:
    """Return a D-FINE with other classes and attributes: what keeps its name keeps its weights.

    Where there are as many classes as before, new ones take the weights of those that are gone, in their order: an
    object of another name may look much the same. So do attributes.

    Parameters
    ----------
    network : nn.Module
    classes, attributes : sequence of str
    known_classes : int, optional
        How many of the network's names are of classes, the first; the others are of attributes. Default: all.

    Examples
    --------
    >>> network = build_network(["figure"], ["odd"], width=0.25)
    >>> relabel(network, ["mitosis"], known_classes=1).config.id2label
    {0: 'mitosis'}
    """
    old: Any = network
    known, names = list(old.config.id2label.values()), [*classes, *attributes]
    ends = len(known) if known_classes is None else known_classes
    row_of: dict[str, int] = {}
    for first, before, after in ((0, known[:ends], classes), (ends, known[ends:], attributes)):
        row_of |= {name: first + before.index(name) for name in after if name in before}
        if len(before) == len(after):
            gone = [first + row for row, name in enumerate(before) if name not in after]
            row_of |= dict(zip([name for name in after if name not in before], gone, strict=True))
    config = _labelled(old.config, names)
    if [row_of.get(name) for name in names] == list(range(len(known))):
        old.config = config
        return network
    fresh: Any = type(network)(config)
    longer = max(len(known), len(names)) + 1
    with torch.device("meta"):  # what changes with the number of names has a row for each
        shapes = {
            key: value.shape
            for key, value in type(network)(_labelled(config, map(str, range(longer)))).state_dict().items()
        }
    weights = fresh.state_dict()  # views: writing to them writes to the network
    for key, there in network.state_dict().items():
        here = weights[key]
        if there.shape == shapes[key]:
            here.copy_(there)
            continue
        for row, name in enumerate(names):
            if name in row_of:
                here[row] = there[row_of[name]]
    return fresh  # type: ignore[no-any-return]


def _labelled(config: Any, names: Iterable[str]) -> Any:
    changed = copy.deepcopy(config)
    changed.id2label = dict(enumerate(names))
    changed.label2id = {name: i for i, name in changed.id2label.items()}
    return changed


def pin(network: nn.Module) -> None:
    """Keep at zero, while the network is trained, what `build_network` pins; do nothing to a network of another kind.

    Hooks are not saved: call it on a network that was loaded.
    """
    pinned = list(_pinned(network))
    if all(bool((parameter * (1 - kept) == 0).all()) for parameter, kept in pinned):
        for parameter, kept in pinned:
            parameter.register_hook(partial(_keep, kept))  # type: ignore[no-untyped-call]


def _keep(kept: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient, zero where a weight is pinned; the network may have moved since."""
    return gradient * kept.to(gradient.device)


def _pinned(network: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield parameters and what of each is trained: 1, or 0 where it is pinned; broadcasts."""
    inner = network.model
    for layer in inner.decoder.layers:
        for parameter in layer.self_attn.o_proj.parameters():
            yield parameter, torch.zeros(())
    yield inner.decoder.query_pos_head.layers[0].weight, torch.tensor([0.0, 0.0, 1.0, 1.0])
    for head in (inner.enc_bbox_head, inner.decoder.pre_bbox_head):
        kept = torch.tensor([0.0, 0.0, 1.0, 1.0])
        yield head.layers[-1].weight, kept[:, None]
        yield head.layers[-1].bias, kept
