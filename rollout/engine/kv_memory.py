"""The memory of the KV pool, which on a GPU comes back to the same addresses: captured graphs know them.

A range of addresses is reserved once. Physical memory is mapped to it while dialogues are sampled and given
back during an update, which needs `cuda.bindings` (torch depends on it since 2.11). Where that is missing or
refuses, torch allocates: then memory that was given back comes back elsewhere, and graphs are captured again.
"""

from __future__ import annotations

import importlib
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""

    def __init__(self, call: str, result: Any) -> None:
        self.result = getattr(result, "name", str(result))
        super().__init__(f"{call}: {self.result}")

    @property
    def out_of_memory(self) -> bool:
        return self.result == "CUDA_ERROR_OUT_OF_MEMORY"


def load_driver() -> Any | None:
    """The driver's functions, None where `cuda.bindings` is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


def describe(device: torch.device) -> str:
    """Whether a pool on this GPU keeps its address when its memory is given back; tries it with a little."""
    driver = load_driver()
    moves = "moves when its memory is given back, and graphs are captured again"
    if driver is None:
        return f"{moves}: cuda.bindings is not installed"
    try:
        memory = FixedMemory(1, device, driver)
        memory.take()
        memory.give_back()
    except DriverError as error:
        return f"{moves}: {error}"
    return "keeps its address when its memory is given back"


@dataclass(slots=True)
class _Range:
    """Of addresses, reserved with `driver`; `mapped` to physical memory or not."""

    driver: Any
    device: torch.device
    address: Any
    size: int
    mapped: bool = False

    def call(self, name: str, *arguments: Any) -> Any:
        return call(self.driver, name, *arguments)

    def unmap(self) -> None:
        torch.cuda.synchronize(self.device)  # of what still reads or writes there
        self.call("cuMemUnmap", self.address, self.size)
        self.mapped = False

    def free(self) -> None:
        if self.mapped:
            self.unmap()
        self.call("cuMemAddressFree", self.address, self.size)


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """What a function of the driver gives; DriverError when it fails."""
    result, *values = getattr(driver, name)(*arguments)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(name, result)
    return values[0] if values else None


class FixedMemory:
    """At least `n_bytes` of a GPU at an address that stays, as long as this or a tensor of it lives.

    DriverError where the driver does not do it.
    """

    def __init__(self, n_bytes: int, device: torch.device, driver: Any) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._n_bytes = n_bytes
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = driver.CUmemAccessDesc()
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for where in (self._kind.location, self._access.location):
            where.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            where.id = index
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        unit = call(driver, "cuMemGetAllocationGranularity", self._kind, least)
        size = -(-n_bytes // unit) * unit
        address = call(driver, "cuMemAddressReserve", size, 0, 0, 0)
        self._range = _Range(driver, torch.device("cuda", index), address, size)
        weakref.finalize(self, self._range.free).atexit = False  # with the process all of it goes anyway

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        pointer = int(self._range.address), False
        return {"shape": (self._n_bytes,), "typestr": "|u1", "data": pointer, "strides": None, "version": 3}

    def take(self) -> None:
        """Map physical memory. After a DriverError there is none, as before."""
        at = self._range
        assert not at.mapped
        physical = at.call("cuMemCreate", at.size, self._kind, 0)
        try:
            try:
                at.call("cuMemMap", at.address, at.size, 0, physical, 0)
                at.mapped = True
            finally:
                at.call("cuMemRelease", physical)  # it lives as long as it is mapped
            at.call("cuMemSetAccess", at.address, at.size, [self._access], 1)
        except DriverError:
            self.give_back()
            raise

    def give_back(self) -> None:
        """The addresses stay reserved; no tensor of them may be used until `take`."""
        if self._range.mapped:
            self._range.unmap()

    def tensor(self) -> Tensor:
        """[n_bytes] uint8, of memory that is mapped."""
        assert self._range.mapped
        try:
            return torch.as_tensor(self, device=self._range.device)
        except RuntimeError as error:
            self.give_back()
            raise DriverError("torch.as_tensor", error) from error


class PoolMemory:
    """The memory of a tensor that is taken, given back and taken again."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._fixed: FixedMemory | None = None
        self._stays = device.type == "cuda"  # as far as is known

    def take(self) -> Tensor:
        """RuntimeError when memory runs out."""
        if self._stays:
            try:
                return self._mapped()
            except DriverError as error:
                if error.out_of_memory:
                    raise
                self._stays, self._fixed = False, None
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def _mapped(self) -> Tensor:
        if self._fixed is None:
            driver = load_driver()
            if driver is None:
                raise DriverError("cuda.bindings", "not installed")
            self._fixed = FixedMemory(math.prod(self.shape) * self.dtype.itemsize, self.device, driver)
        self._fixed.take()
        return self._fixed.tensor().view(self.dtype).view(self.shape)

    def give_back(self) -> None:
        """After the last use of the tensor."""
        if self._fixed is not None:
            self._fixed.give_back()
