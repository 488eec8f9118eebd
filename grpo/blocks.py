"""Parameters that lie end to end in one buffer: a layer's matrices, a layer's vectors, or one of
neither.

    buffer   q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj | padding

Each begins at a multiple of `LANES` numbers, where kernels and GPUs load whole vectors. What lies between
them belongs to nobody. A block is what an optimizer of several ranks sends at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from duologue.kernels import pages
from torch import Tensor, nn

LANES = 64  # numbers


@dataclass
class Block:
    """The places of some parameters in a buffer [size] whose size is a multiple of `unit`."""

    dtype: torch.dtype
    device: torch.device
    unit: int
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers."""
        return _up(sum(_up(shape.numel(), LANES) for shape in self.shapes.values()), self.unit)

    @property
    def wide(self) -> torch.dtype:
        """Of masters, moments and sums of gradients: at least fp32."""
        return self.dtype if self.dtype.itemsize >= 4 else torch.float32

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of `flat` [size] by parameter, each in its shape."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            views[name] = flat[start : start + shape.numel()].view(shape)
            start += _up(shape.numel(), LANES)
        return views

    def empty(self) -> Tensor:
        """[size] wide: any values, and 0 where no parameter lies."""
        flat = torch.empty(self.size, dtype=self.wide, device=self.device)
        end = start = 0
        for shape in self.shapes.values():
            flat[end:start] = 0
            end = start + shape.numel()
            start += _up(shape.numel(), LANES)
        flat[end:] = 0
        return flat

    def filled(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[size] wide, with these values."""
        flat = self.empty()
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])
        return flat

    def take_in(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Make the block's parameters views of a new buffer [size], which is returned; they stay the same
        objects, with the same values.
        """
        flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        pages.prefer_huge(flat)
        flat.zero_()
        for name, view in self.views(flat).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        return flat


def blocks_of(parameters: Mapping[str, Tensor], unit: int = 1) -> dict[str, Block]:
    """All parameters, in blocks by name, in the order in which the first of each comes."""
    blocks: dict[str, Block] = {}
    for name, parameter in parameters.items():
        block = Block(parameter.dtype, parameter.device, unit)
        blocks.setdefault(block_of(name, parameter), block).shapes[name] = parameter.shape
    return blocks


def block_of(name: str, parameter: Tensor) -> str:
    """The block that a parameter is in: its layer's, or one of its own; by type, and by whether weight decay
    is on it.
    """
    layer = re.match(r"(.*\blayers[._]\d+)[._]", name)
    kind = "matrices" if parameter.dim() >= 2 else "vectors"
    return f"{layer[1] if layer else name} {parameter.dtype} {kind}"


def is_matrices(block: str) -> bool:
    return block.endswith("matrices")


def _up(n: int, unit: int) -> int:
    """`n`, or the next multiple of `unit`."""
    return -(-n // unit) * unit
