"""Tiny random models of the families of transformers that have deformable attention, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from torch import Tensor, nn

from slidescan.train.network import build_network

HEIGHT, WIDTH = 64, 96  # px
SIDE = 64  # px, of the backbones that take squares
HIDDEN = 16
CHANNELS = [8, 8, 16, 16]  # of the backbone's four stages


class Case(NamedTuple):
    """A model, what it takes, and how many modules with deformable attention it has."""

    model: nn.Module
    inputs: dict[str, Tensor]
    modules: int


def pixels(height: int = HEIGHT, width: int = WIDTH) -> dict[str, Tensor]:
    """Two random images."""
    return {"pixel_values": torch.rand(2, 3, height, width, dtype=torch.float64)}


def stages(kind: type, out_indices: Sequence[int] = (2, 3, 4)) -> Any:
    """Configure a small ResNet."""
    return kind(
        embedding_size=8,
        hidden_sizes=CHANNELS,
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=list(out_indices),
    )


def swin(out_indices: Sequence[int] = (2, 3, 4)) -> hf.SwinConfig:
    """Configure a small Swin."""
    return hf.SwinConfig(
        image_size=SIDE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        out_indices=list(out_indices),
    )


# DETR, Mask2Former and their kin normalise over 32 groups of channels.
DETR: dict[str, Any] = {
    "num_queries": 10,
    "encoder_layers": 2,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_n_points": 3,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 4,
    "decoder_n_points": 2,
    "d_model": 64,
    "num_labels": 3,
}


def deformable_detr(**settings: Any) -> Case:
    """Two layers of encoder and two of decoder, four levels."""
    config = hf.DeformableDetrConfig(
        backbone_config=stages(hf.ResNetConfig), two_stage_num_proposals=10, **DETR, **settings
    )
    return Case(hf.DeformableDetrForObjectDetection(config), pixels(), 4)


def grounding(family: type, kind: type) -> Case:
    """Deformable DETR with a text encoder."""
    text = hf.BertConfig(
        vocab_size=1100,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    config = kind(backbone_config=swin(), text_config=text, max_text_len=16, **DETR)
    words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]] * 2)  # [CLS] a b . c . [SEP]
    return Case(family(config), {**pixels(), "input_ids": words}, 4)


def hybrid(family: type, kind: type, out_indices: Sequence[int] = (2, 3, 4), **settings: Any) -> Case:
    """RT-DETR and what followed it: a hybrid encoder, two layers of decoder, three levels."""
    config = kind(
        backbone_config=stages(hf.RTDetrResNetConfig, out_indices),
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=HIDDEN,
        encoder_in_channels=CHANNELS[1:],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        hidden_expansion=0.5,
        d_model=HIDDEN,
        num_queries=10,
        decoder_in_channels=[HIDDEN] * 3,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_labels=3,
        **settings,
    )
    return Case(family(config), pixels(), 2)


def pp_doclayout_v2() -> Case:
    """RT-DETR with a reading order over its boxes."""
    order = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "coordinate_size": 6,
        "shape_size": 4,
        "global_pointer_head_size": 8,
    }
    return hybrid(
        hf.PPDocLayoutV2ForObjectDetection,
        hf.PPDocLayoutV2Config,
        class_thresholds=[0.0, 0.0, 0.0],
        class_order=[0, 1, 2],
        reading_order_config=order,
    )


def d_fine() -> Case:
    """Ours, with random weights where ours are pinned: two levels of 6 and 4 points, three layers."""
    pinned: Any = build_network(["a"], width=0.25, queries=10)
    return Case(type(pinned)(pinned.config), pixels(), 3)


LIGHT: dict[str, Any] = {
    "d_model": HIDDEN,
    "c2f_num_blocks": 1,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 10,
    "group_detr": 2,
    "num_labels": 3,
}


def lw_detr(patch_size: int = 8, num_windows: int = 4) -> Case:
    """A windowed ViT, three levels, two layers."""
    backbone = hf.LwDetrViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=SIDE,
        pretrain_image_size=SIDE,
        patch_size=patch_size,
        window_block_indices=[0],
        num_windows=num_windows,
        out_indices=[1, 2],
    )
    config = hf.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[2.0, 1.0, 0.5], **LIGHT)
    return Case(hf.LwDetrForObjectDetection(config), pixels(), 2)


def rf_detr(family: type) -> Case:
    """A windowed DINOv2, one level, two layers."""
    backbone = hf.RfDetrDinov2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=SIDE,
        patch_size=8,
        num_windows=2,
        out_indices=[1, 2],
    )
    return Case(family(hf.RfDetrConfig(backbone_config=backbone, **LIGHT)), pixels(SIDE, SIDE), 2)


# Those that find objects and need nothing but an image.
DETECTORS: dict[str, Callable[[], Case]] = {
    "Deformable DETR": deformable_detr,
    "Deformable DETR, two stages": partial(deformable_detr, two_stage=True, with_box_refine=True),
    "RT-DETR": partial(hybrid, hf.RTDetrForObjectDetection, hf.RTDetrConfig),
    "RT-DETRv2": partial(hybrid, hf.RTDetrV2ForObjectDetection, hf.RTDetrV2Config),
    "RT-DETRv2, discrete": partial(hybrid, hf.RTDetrV2ForObjectDetection, hf.RTDetrV2Config, decoder_method="discrete"),
    "D-FINE": d_fine,
    "D-FINE, discrete": partial(
        hybrid, hf.DFineForObjectDetection, hf.DFineConfig, decoder_n_points=[3, 6, 3], decoder_method="discrete"
    ),
    "DEIMv2": partial(hybrid, hf.Deimv2ForObjectDetection, hf.Deimv2Config, decoder_n_points=[3, 6, 3]),
    "PP-DocLayoutV2": pp_doclayout_v2,
    "PP-DocLayoutV3": partial(
        hybrid,
        hf.PPDocLayoutV3ForObjectDetection,
        hf.PPDocLayoutV3Config,
        out_indices=[1, 2, 3, 4],
        x4_feat_dim=CHANNELS[0],
        mask_feature_channels=[8, 8],
        num_prototypes=4,
    ),
    "LW-DETR": lw_detr,
    "RF-DETR": partial(rf_detr, hf.RfDetrForObjectDetection),
}
if hasattr(hf, "PPDocLayoutV4Config"):  # since transformers 5.2x
    DETECTORS["PP-DocLayoutV4"] = partial(hybrid, hf.PPDocLayoutV4ForObjectDetection, hf.PPDocLayoutV4Config)


def randomised(make: Callable[[], Case], seed: int = 0, spread: float = 0.1) -> Case:
    """A model with random weights, in float64."""
    torch.manual_seed(seed)
    case = make()
    case.model.eval().double()
    with torch.no_grad():
        for weight in case.model.parameters():
            # transformers starts many at zero or one, the weights of offsets among them.
            weight.add_(spread * torch.randn_like(weight))
    return case


def picture(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Squares of random colours, of 16 px: what is finer is lost in a network, and all places look the same."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return colours.repeat(16, 0).repeat(16, 1)[:height, :width]


def network(make: Callable[[], Case], spread: float = 0.15) -> Any:
    """A random model in float32, whose batch normalisation does something."""
    model = randomised(make, spread=spread).model.float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def saved(model: Any, directory: Path) -> Path:
    """Write a model directory as transformers does."""
    model.save_pretrained(directory)
    return directory
