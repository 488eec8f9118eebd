"""Memory in huge pages, where Linux gives them: weights that are read from end to end come quicker, for fewer
pages have to be found."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

MADV_HUGEPAGE, HUGE = 14, 2**21
LANE = 64  # bytes to which a tensor is aligned


def prefer_huge(tensor: Tensor) -> None:
    """Ask for huge pages under memory on the CPU that was not written yet. A system that has none is no
    error."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    begin = -(-tensor.data_ptr() // HUGE) * HUGE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // HUGE * HUGE
    if madvise is not None and tensor.device.type == "cpu" and size > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_HUGEPAGE)


def together(tensors: Sequence[Tensor]) -> None:
    """Move tensors of one dtype on the CPU into one buffer, out of a mapped file that aligns nothing."""
    unit = LANE // tensors[0].element_size()
    sizes = [-(-tensor.numel() // unit) * unit for tensor in tensors]
    buffer = tensors[0].new_empty(sum(sizes))
    prefer_huge(buffer)
    for tensor, part in zip(tensors, torch.split(buffer, sizes), strict=True):
        view = part[: tensor.numel()].view(tensor.shape)
        tensor.data = view.copy_(tensor.data)
