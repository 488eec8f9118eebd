"""The one place where a kernel of this folder is launched, and what is asked of the GPU for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100; other chips have about as many


def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> None:
    """kernel[grid](...) on the GPU that holds the first argument, a tensor. Triton takes the current device
    and its stream, which need not be that one: a tensor may be on cuda:1 while cuda:0 is current.
    """
    x = arguments[0]
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.get_device()):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def capability(x: Tensor) -> int:
    """Of the GPU that holds `x`, as 90 for 9.0; 0 in the interpreter."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds `x`, an H100's in the interpreter."""
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
