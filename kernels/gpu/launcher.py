"""The one place where a kernel of this folder is launched."""

from __future__ import annotations

from typing import Any

import torch


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
