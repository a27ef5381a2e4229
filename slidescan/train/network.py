"""The small D-FINE that is trained: its size as a transformers configuration, with random weights.

1.7 M parameters. Two levels of stride 8 and 16 px see an object of 25 to 50 px over 2 to 6 cells, which is enough
to place it within 2 µm; a third level would serve larger objects than there are. No encoder attention: whether a
nucleus is in mitosis is decided within 20 µm of it, and so its features do not depend on the tile's size. Narrow where
pixels are many: with 96 channels and two layers in the first stages it trains 1.4 times and runs 1.3 times as fast as
with 128 and three, and most of what those cost was spent on stride 4 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["build_network"]


def build_network(
    classes: list[str], attributes: Sequence[str] = (), *, width: float = 1.0, queries: int = 100
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
        Most objects a tile can have.

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
        num_denoising=40,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    network: Any = DFineForObjectDetection(config)
    return network  # type: ignore[no-any-return]
