"""Multi-scale deformable attention: a few bilinear samples a query, weighted and summed.

`deform_attn` is the op, with three backends; `reference` is the same in plain sight; `accelerate` puts it into a
transformers model. What they share is in the docstring of `slidescan.ops.deform_attn`.
"""

from __future__ import annotations

from slidescan.ops.accelerate import accelerate
from slidescan.ops.deform_attn import deform_attn
from slidescan.ops.reference import reference

__all__ = ["accelerate", "deform_attn", "reference"]
