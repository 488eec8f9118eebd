"""The KV pool's memory at a fixed address, against a driver that keeps books."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.grpo.commands import doctor
from duologue.model.decoder import Decoder
from duologue.rollout.engine import kv_memory
from duologue.rollout.engine.decode_gpu import DeviceLoop
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.kv_memory import DriverError, FixedMemory, PoolMemory
from duologue.rollout.engine.sequence import Completion, SamplingParams

from tests.tiny import decoder

UNIT = 2048  # bytes of the driver's granularity
CALLS = ("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess")
CUDA = torch.device("cuda", 3)


class Driver:
    """Stands in for `cuda.bindings.driver`: the calls that it takes, as CUDA's manual has them, and their
    books. `fails[call]` is the result of the next such call.
    """

    def __init__(self) -> None:
        self.reserved: dict[int, int] = {}
        self.physical: dict[int, int] = {}  # by handle, those that were not released
        self.mapped: dict[int, int] = {}
        self.readable: set[int] = set()
        self.memory: dict[int, torch.Tensor] = {}
        self.fails: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.in_flight = False
        self._next = itertools.count(1)
        self.CUresult = SimpleNamespace(CUDA_SUCCESS="CUDA_SUCCESS")
        self.CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
        self.CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
        self.CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="both")
        self.CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="least")

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(flags=None, location=SimpleNamespace(type=None, id=None))

    def _result(self, call: str) -> str:
        self.calls[call] += 1
        return self.fails.pop(call, "CUDA_SUCCESS")

    def cuMemGetAllocationGranularity(self, kind: Any, option: str) -> tuple[Any, ...]:
        assert (kind.type, kind.location.type, option) == ("pinned", "device", "least")
        result = self._result("cuMemGetAllocationGranularity")
        return result, UNIT if result == "CUDA_SUCCESS" else 0

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        assert size > 0
        assert size % UNIT == alignment == address == flags == 0
        if (result := self._result("cuMemAddressReserve")) != "CUDA_SUCCESS":
            return result, 0
        memory = torch.zeros(size, dtype=torch.uint8)
        self.memory[memory.data_ptr()] = memory
        self.reserved[memory.data_ptr()] = size
        return result, memory.data_ptr()

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        assert address not in self.mapped
        assert self.reserved.pop(address) == size
        return (self._result("cuMemAddressFree"),)

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple[Any, ...]:
        assert size % UNIT == flags == 0
        assert (kind.type, kind.location.type) == ("pinned", "device")
        assert isinstance(kind.location.id, int)
        if (result := self._result("cuMemCreate")) != "CUDA_SUCCESS":
            return result, 0
        handle = next(self._next)
        self.physical[handle] = size
        return result, handle

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        del self.physical[handle]
        return (self._result("cuMemRelease"),)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        assert offset == flags == 0
        assert self.reserved[address] == self.physical[handle] == size
        assert address not in self.mapped
        if (result := self._result("cuMemMap")) == "CUDA_SUCCESS":
            self.mapped[address] = size
            self.memory[address].random_()  # other memory than before
        return (result,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        assert not self.in_flight, "memory that kernels still use"
        assert self.mapped.pop(address) == size
        self.readable.discard(address)
        return (self._result("cuMemUnmap"),)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        assert self.mapped[address] == size
        assert len(access) == count == 1
        assert (access[0].flags, access[0].location.type) == ("both", "device")
        if (result := self._result("cuMemSetAccess")) == "CUDA_SUCCESS":
            self.readable.add(address)
        return (result,)

    @property
    def nothing_left(self) -> bool:
        gc.collect()
        return not (self.reserved or self.physical or self.mapped)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver, as_tensor = Driver(), torch.as_tensor

    def wrapped(data: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        if not hasattr(data, "__cuda_array_interface__"):
            return as_tensor(data, *arguments, **options)
        told = data.__cuda_array_interface__
        address, read_only = told["data"]
        assert address in driver.readable
        assert (told["typestr"], told["strides"], read_only) == ("|u1", None, False)
        return driver.memory[address][: told["shape"][0]]

    def synchronize(device: Any) -> None:
        driver.in_flight = False

    monkeypatch.setattr(kv_memory, "load_driver", lambda: driver)
    monkeypatch.setattr(torch, "as_tensor", wrapped)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return driver


@pytest.mark.parametrize("n_bytes", [1, UNIT, UNIT + 1, 5 * UNIT - 1])
def test_an_address_stays_and_its_memory_comes_and_goes(n_bytes: int, driver: Driver) -> None:
    memory = FixedMemory(n_bytes, CUDA, driver)
    assert [*driver.reserved.values()] == [-(-n_bytes // UNIT) * UNIT]
    addresses = set()
    for _ in range(3):
        assert not driver.mapped
        memory.take()
        assert [*driver.mapped.values()] == [*driver.reserved.values()]
        assert not driver.physical  # nothing to release: unmapping frees it
        tensor = memory.tensor()
        addresses.add(tensor.data_ptr())
        assert len(tensor) == n_bytes
        driver.in_flight = True
        memory.give_back()
        memory.give_back()
    assert len(addresses) == driver.calls["cuMemAddressReserve"] == 1
    memory.take()
    del memory
    assert driver.nothing_left


@pytest.mark.parametrize(
    ("call", "round_"),
    [
        *((call, 0) for call in (*CALLS, "cuMemRelease", "torch.as_tensor", "no bindings")),
        *((call, 1) for call in (*CALLS[2:], "cuMemRelease", "torch.as_tensor")),
    ],
)
def test_what_the_driver_refuses_torch_allocates(call: str, round_: int, driver: Driver) -> None:
    """At once or after memory was given back; nothing leaks, and nobody asks again."""
    taken: list[Any] = []
    of_torch = torch.ones(6, 5)
    memory = PoolMemory((6, 5), torch.float32, CUDA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, **how: taken.append((shape, how)) or of_torch)
        for _ in range(round_):
            assert memory.take().data_ptr() in driver.mapped
            memory.give_back()
        if call == "torch.as_tensor":
            patch.setattr(FixedMemory, "tensor", raising)
        elif call == "no bindings":
            patch.setattr(kv_memory, "load_driver", lambda: None)
        else:
            driver.fails[call] = "CUDA_ERROR_NOT_SUPPORTED"
        assert memory.take() is of_torch
        assert driver.nothing_left
        memory.give_back()
        assert memory.take() is of_torch
        assert taken == [((6, 5), {"dtype": torch.float32, "device": CUDA})] * 2
        assert driver.calls["cuMemAddressReserve"] <= 1
    assert driver.nothing_left


def raising(memory: FixedMemory) -> Any:
    memory.give_back()
    raise DriverError("torch.as_tensor", "no")


def test_memory_that_is_not_there_is_an_error_and_may_be_there_later(driver: Driver) -> None:
    memory = PoolMemory((64, 100), torch.bfloat16, CUDA)
    driver.fails["cuMemCreate"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(DriverError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.take()
    assert not driver.mapped
    tensor = memory.take()
    assert (tensor.shape, tensor.dtype) == ((64, 100), torch.bfloat16)
    assert tensor.data_ptr() in driver.mapped
    memory.give_back()
    del memory, tensor
    assert driver.nothing_left


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.entropies, c.finish_reason) for c in completions]


def test_graphs_outlive_updates(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is captured once, whatever the cycles of sampling, giving memory back and new weights."""
    captured: list[Any] = []
    monkeypatch.setattr(Decoder, "paged_layers", lambda self: None)
    monkeypatch.setattr(DeviceLoop, "_captured", lambda loop, bucket, step: captured.append(bucket) or step)
    model = decoder(vocab_size=70)
    engine = Engine(model, cache_tokens=1024, decode_steps=4, max_batch=7)
    loop: Any = engine._runner.loop
    loop.capture, loop.held = True, 2
    engine.release_memory()
    engine._runner._memory._stays = True
    prompts = [[1, 2, 3], [4], [5, 6], list(range(40))]
    params = [SamplingParams(max_new_tokens=14 - i, seed=i) for i in range(4)]
    n_graphs = set()
    for _ in range(3):
        plain = drawn(Engine(model, decode_steps=1).generate(prompts, params))
        assert drawn(engine.generate(prompts, params)) == plain
        n_graphs.add(len(captured))
        driver.in_flight = True
        engine.release_memory()
        assert not driver.mapped
        with torch.no_grad():
            model.head_weight.mul_(1.1)
    assert len(n_graphs) == 1
    sizes = [len(bucket.rows.last) for bucket in captured]
    assert sizes[0] == max(sizes) == 8  # so that the others find its memory
    assert len(loop._buckets) == n_graphs.pop() > 1
    assert driver.calls["cuMemCreate"] == 3
    del engine, loop
    assert driver.nothing_left


def test_a_pool_that_does_not_fit_says_what_it_takes(driver: Driver) -> None:
    engine = Engine(decoder(vocab_size=70), cache_tokens=1024, decode_steps=4)
    engine.release_memory()
    engine._runner._memory._stays = True
    driver.fails["cuMemCreate"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(MemoryError, match=r"the KV pool of .* tokens takes .* lower rollout.cache_tokens"):
        engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))


def test_doctor_says_whether_a_pool_keeps_its_address(driver: Driver) -> None:
    assert kv_memory.describe(CUDA) == "keeps its address when its memory is given back"
    driver.fails["cuMemCreate"] = "CUDA_ERROR_NOT_PERMITTED"
    assert kv_memory.describe(CUDA).endswith("captured again: cuMemCreate: CUDA_ERROR_NOT_PERMITTED")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_memory, "load_driver", lambda: None)
        assert kv_memory.describe(CUDA).endswith("captured again: cuda.bindings is not installed")
    assert driver.nothing_left
    assert doctor.kv_memory is kv_memory
