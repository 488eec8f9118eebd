"""Arrays from the host to a device: on a GPU all in one copy from pinned memory, which nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGN = 16  # bytes


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Tensors of these names, shapes and dtypes; on CPU they share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return parts(joined(arrays, pin=device.type == "cuda").to(device, non_blocking=True), arrays)


def joined(arrays: Mapping[str, np.ndarray], pin: bool) -> Tensor:
    """[bytes] uint8 on the host: the arrays one after the other, each aligned."""
    buffer = torch.empty(sum(map(_room, arrays.values())), dtype=torch.uint8, pin_memory=pin)
    memory, start = buffer.numpy(), 0
    for array in arrays.values():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory[start : start + len(flat)] = flat
        start += _room(array)
    return buffer


def parts(buffer: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """What `joined` laid into the buffer, as views of it."""
    tensors, start = {}, 0
    for name, array in arrays.items():
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors[name] = buffer[start : start + array.nbytes].view(dtype).view(array.shape)
        start += _room(array)
    return tensors


def array_parts(buffer: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`parts` of a buffer [bytes] on the host."""
    views, start = {}, 0
    for name, array in arrays.items():
        views[name] = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        start += _room(array)
    return views


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // ALIGN) * ALIGN


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor into pinned memory, which is to be read after `recorded`
    of that moment has been waited for.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """Where the device's queue ends at present; None for one without a queue."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
