"""Deformable attention for transformers models.

`deform_attn` is the op, `reference` the same in plain sight, `accelerate` puts it into a model. transformers calls the
op in three ways; `accelerate` knows one:

- as an attribute of the attention module (D-FINE, DEIMv2): done;
- as a sub-module (Deformable DETR, RT-DETR, …) and as a function of the model's own module (RT-DETRv2, Mask2Former):
  not yet. Each is one more branch there.
"""

from __future__ import annotations

from slidescan.ops.deform_attn import accelerate, deform_attn, reference

__all__ = ["accelerate", "deform_attn", "reference"]
