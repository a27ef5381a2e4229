"""Compile the GPU kernels for NVIDIA's targets, which needs no GPU, and print what the machine code holds.

Run in a process of its own: a process that interprets kernels cannot compile them. Prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from slidescan.ops import fused

_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Launched:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.args, self.constants = args, constants

        return launch

    def compiled(self, architecture: int) -> Any:
        """Compile as a launch would, which looks whether 16 divides a size; sizes of 1 are none of ours."""
        options = {name: self.constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        signature, constants, known = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name], constants[(i,)] = "constexpr", self.constants[name]
                continue
            argument = self.args[i]
            if isinstance(argument, Tensor):
                signature[name] = _TYPES.get(argument.dtype, "*i32")
                known[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i64" if argument >= 2**31 else "i32"
                if argument % 16 == 0:
                    known[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, known)
        return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def report(architecture: int, dtype: torch.dtype, depth: int, points: int, *, far: bool = False) -> None:
    """Compile both kernels for one shape and print a line for each."""
    shapes, heads, queries = [(16, 16), (8, 8)], 8, 300
    value = torch.zeros(1, 320, heads, depth, dtype=dtype)
    if far:
        value = torch.empty(2**25 * 319 + heads * depth, dtype=dtype, device="meta").as_strided(
            (1, 320, heads, depth), (2**34, 2**25, depth, 1)
        )
    locations = torch.zeros(1, queries, heads, 2 * points, 2, dtype=max(dtype, torch.float32, key=lambda t: t.itemsize))
    weights = torch.zeros(1, queries, heads, 2 * points, dtype=dtype)
    inputs = value, shapes, locations, weights, [points, points]
    grad = torch.zeros(1, queries, heads * depth, dtype=dtype)
    fused.launch_table().clear()  # what the code holds is told of one launch, whatever is tuned
    for direction in ("forward", "backward"):
        name = f"{direction}_kernel"
        stand_in = Launched(getattr(fused, name))
        setattr(fused, name, stand_in)
        if direction == "forward":
            fused.fused(*inputs)
        else:
            fused.fused_backward(grad, *inputs, (True, True))
        setattr(fused, name, stand_in.kernel)
        code = stand_in.compiled(architecture)
        told = {"direction": direction, "unroll": stand_in.constants["UNROLL"], "bytes": len(code.asm["cubin"])}
        print(json.dumps({"case": [architecture, str(dtype), depth, far], **told, **counted(code.asm["ptx"])}))


def counted(assembly: str) -> dict[str, int]:
    """Count loads from global memory, sums into it, and barriers; wide are those of several numbers a lane."""
    of = {"loads": r"ld\.global", "sums": r"(?:red|atom)\.global"}
    counts = {"barriers": len(re.findall(r"\bbar\.sync", assembly))}
    for name, operation in of.items():
        found = re.findall(rf"\b{operation}\S*", assembly)
        wide = [each for each in found if re.search(r"\.v[248]\b", each)]
        counts |= {name: len(found) - len(wide), f"wide {name}": len(wide)}
    return counts


if __name__ == "__main__":
    for line in sys.argv[1:]:
        architecture, dtype, depth, points, far = json.loads(line)
        report(architecture, getattr(torch, dtype), depth, points, far=far)
