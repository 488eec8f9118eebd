"""The tile instructions: held to their emulation bit for bit, to float64, and to the bits of a row alone; the
instruction set as part of a run; the cores of a machine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from duologue.grpo import resume
from duologue.kernels import backend, cores, libraries, linear, ops
from torch import Tensor

needs_cpp = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
TILED = [isa for isa in ("amx", "amx-emulated") if backend.runs(isa)]
NARROW = [isa for isa in ("avx512bf16", "amx", "amx-emulated") if backend.runs(isa)]  # that multiply bf16
KINDS = ("normal", "tiny", "huge", "denormal", "any")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    if backend.available():
        backend.use(os.environ.get("DUOLOGUE_CPU", ""))


def tiles(kind: str, n: int, seed: int) -> Tensor:
    """bf16 [n, 16, 32] of a kind of numbers; "any" are all bits there are."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**16, (n, 16, 32), generator=g).int()
    if kind == "any":
        return bits.to(torch.int16).view(torch.bfloat16)
    if kind == "denormal":
        return (bits & 0x80FF).to(torch.int16).view(torch.bfloat16)  # and the smallest normal numbers
    scale = {"normal": 1.0, "tiny": 2.0**-64, "huge": 2.0**62}[kind]
    return (torch.randn(n, 16, 32, generator=g) * scale).bfloat16()


def product(isa: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    backend.use(isa)
    out = c.clone()
    backend.lib().tile_products(*backend.pointers(a, b, out), len(a))
    return out


@pytest.mark.skipif("amx" not in TILED, reason="this machine has no AMX")
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("left", KINDS)
def test_the_emulation_is_the_instruction_bit_for_bit(left: str, right: str) -> None:
    a, b = tiles(left, 40, 0), tiles(right, 40, 1)
    bits = torch.randint(-(2**31), 2**31, (40, 16, 16), generator=torch.Generator().manual_seed(2)).int()
    for c in (torch.zeros(40, 16, 16), bits.view(torch.float32), torch.full((40, 16, 16), 2.0**-126)):
        ours, theirs = product("amx-emulated", a, b, c), product("amx", a, b, c)
        same = ours.view(torch.int32) == theirs.view(torch.int32)
        assert bool((same | (ours.isnan() & theirs.isnan())).all())


@needs_cpp
@pytest.mark.parametrize("isa", TILED)
def test_a_product_of_small_whole_numbers_is_exact(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (5, 16, 32), generator=g).bfloat16() for _ in range(2))
    c = torch.randint(-99, 99, (5, 16, 16), generator=g).float()
    pairs = b.view(5, 16, 16, 2).transpose(2, 3).reshape(5, 32, 16)  # [k, n]
    assert torch.equal(product(isa, a, b, c), c + a.float() @ pairs.float())


@needs_cpp
@pytest.mark.parametrize("isa", TILED)
def test_denormals_count_as_zero(isa: str) -> None:
    smallest = torch.full((1, 16, 32), 2.0**-126).bfloat16()
    below, ones = smallest / 2, torch.ones(1, 16, 32).bfloat16()
    nothing = torch.zeros(1, 16, 16)
    assert bool((product(isa, below, ones, nothing) == 0).all())
    assert bool((product(isa, smallest, ones / 2, nothing) == 0).all())
    assert torch.equal(product(isa, smallest, ones, nothing), torch.full((1, 16, 16), 2.0**-121))


@needs_cpp
@pytest.mark.parametrize("isa", TILED)
@pytest.mark.parametrize(("O", "K"), [(16, 32), (61, 129), (1, 1), (130, 31), (64, 96)])
def test_a_row_depends_on_itself_alone(isa: str, O: int, K: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(77, K, generator=g).bfloat16(), torch.randn(O, K, generator=g).bfloat16()
    threads = backend.lib().threads()
    backend.use(isa)
    whole = ops.linear(x, weight)
    for m in (1, 2, 15, 16, 17, 33):
        assert torch.equal(ops.linear(x[7 : 7 + m], weight), whole[7 : 7 + m])
        assert torch.equal(ops.linear(x, weight[:m]), whole[:, :m])
    order = torch.randperm(77, generator=g)
    assert torch.equal(ops.linear(x[order], weight), whole[order])
    backend.lib().set_threads(3)
    assert torch.equal(ops.linear(x, weight), whole)
    backend.lib().set_threads(threads)


@needs_cpp
@pytest.mark.parametrize("isa", TILED)
@pytest.mark.parametrize(("O", "K"), [(61, 129), (1, 1), (160, 700), (3400, 131)])
def test_many_rows_have_the_bits_of_few(isa: str, O: int, K: int) -> None:
    """From 2,048 rows on the weights are the packed operand; 3,400 outputs are packed in two parts."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2093, K, generator=g).bfloat16(), torch.randn(O, K, generator=g).bfloat16()
    bias = torch.randn(O, generator=g).bfloat16()
    before = backend.lib().threads()
    backend.use(isa)
    for dtype, threads in ((torch.bfloat16, 3), (torch.float32, 1))[: 1 if O > 1000 else 2]:
        backend.lib().set_threads(threads)
        whole = ops.linear(x, weight, bias, out_dtype=dtype)
        backend.lib().set_threads(before)
        for begin, end in ((0, 33), (2031, 2093)):
            assert torch.equal(ops.linear(x[begin:end], weight, bias, out_dtype=dtype), whole[begin:end])


@needs_cpp
@pytest.mark.parametrize("isa", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("I", "R", "C"), [(16, 32, 16), (33, 70, 45), (1, 5, 1), (70, 600, 33), (40, 1600, 130), (301, 65, 200)]
)
def test_backward_products(isa: str, dtype: torch.dtype, I: int, R: int, C: int) -> None:
    """Against float64, along both strides, on one thread and three, on top of what is there or not."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(I, R, generator=g).to(dtype), torch.randn(R, C, generator=g).bfloat16()
    start = torch.randn(I, C, generator=g)
    exact = a.bfloat16().double() @ b.double()
    threads = backend.lib().threads()
    backend.use(isa)
    found = []
    for n in (1, 3):
        backend.lib().set_threads(n)
        for add in (False, True):
            for left, strides in ((a, (R, 1)), (a.t().contiguous(), (1, I))):
                out = start.clone()
                linear.matmul(left, b, out, (I, R, C, *strides), add, narrow=True)
                assert float((out - exact - add * start).abs().max()) < 2e-6 * R
                found.append(out)
                if not add:
                    narrow = torch.empty(I, C, dtype=torch.bfloat16)
                    linear.matmul(left, b, narrow, (I, R, C, *strides), add, narrow=True)
                    assert torch.equal(narrow, out.bfloat16())
    backend.lib().set_threads(threads)
    for i, out in enumerate(found):
        assert torch.equal(out, found[i // 2 % 2 * 2])


# ---- the instruction set of a run --------------------------------------------------------------------------


def noted(folder: Path, name: str | None) -> Path:
    state = {} if name is None else {"instruction_set": name}
    (folder / "trainer_state.json").write_text(json.dumps(state), "utf-8")
    return folder


def of(dtype: str) -> resume.Settings:
    return {("model", "device"): "cpu", ("model", "dtype"): dtype}


@needs_cpp
def test_fp32_is_computed_alike_with_and_without_tiles() -> None:
    names = {}
    for isa in ("avx512", "avx512-nobf16", "avx512bf16", "amx"):
        if backend.runs(isa):
            backend.use(isa)
            names[isa] = backend.instruction_set("cpu", torch.float32)
    assert set(names.values()) <= {"avx512"}


@needs_cpp
def test_a_resume_needs_the_instruction_set_of_its_run(tmp_path: Path) -> None:
    backend.use("generic")
    resume.check_instruction_set(noted(tmp_path, None), of("bfloat16"))  # older than the name
    resume.check_instruction_set(noted(tmp_path, "generic"), of("bfloat16"))
    emulated = noted(tmp_path, "amx-emulated")
    with pytest.raises(ValueError, match=r"generic would serve.*: resume it with DUOLOGUE_CPU=amx-emulated"):
        resume.check_instruction_set(emulated, of("bfloat16"))


@needs_cpp
def test_a_resume_without_tiles_says_how_to_start_a_run_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.use("generic")
    monkeypatch.setattr(backend, "runs", lambda isa: isa != "amx")
    with pytest.raises(ValueError, match=r"cannot run amx; start .* with DUOLOGUE_CPU=avx512bf16$"):
        resume.check_instruction_set(noted(tmp_path, "amx"), of("bfloat16"))


def test_a_resume_on_another_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(libraries, "HAS_FLASH_ATTN", False)
    there, cuda = libraries.describe_gpu(), {("model", "device"): "cuda:1"}
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"gpu": there}), "utf-8")
    assert there.startswith(f"NVIDIA H200, torch {torch.__version__}, triton ")
    assert resume.gpu_moved(tmp_path, cuda) == []
    assert resume.gpu_moved(tmp_path, of("bfloat16")) == []  # check_same speaks of another kind of device
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    (line,) = resume.gpu_moved(tmp_path, cuda)
    assert line.startswith(f"{tmp_path} was written on NVIDIA H200, torch ")
    assert "; here it is NVIDIA A100, torch " in line
    assert line.endswith(": the run goes on, in other bits")
    state.write_text("{}", "utf-8")  # older than the line
    assert resume.gpu_moved(tmp_path, cuda) == []


# ---- cores -------------------------------------------------------------------------------------------------


def machine(root: Path, siblings: list[str]) -> Path:
    for cpu, text in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def test_hyper_threads_are_one_core(tmp_path: Path) -> None:
    root = machine(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert cores.physical_cores({0, 1, 2, 3}, root) == 2
    assert cores.physical_cores({0, 2}, root) == 1
    assert cores.physical_cores({0, 1, 7}, root) == 3  # of 7 nothing is known


def write_groups(root: Path, line: str, files: dict[str, str]) -> None:
    """This process's control group, and files of groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, math.inf),
        ("0::/not/here", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
                              "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:memory:/a", {"memory/a/cpu.max": "100000 100000"}, math.inf),
    ],
)  # fmt: skip
def test_a_container_limits_the_threads(
    tmp_path: Path, line: str, files: dict[str, str], limit: float
) -> None:
    write_groups(tmp_path, line, files)
    assert cores.time_limit(tmp_path) == limit
    assert cores.memory_limit(tmp_path) == math.inf
    assert 1 <= cores.thread_count(tmp_path) <= max(1, math.ceil(min(limit, len(cores.available_cpus()))))


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/job/step", {"job/memory.max": "700", "job/step/memory.max": "max"}, 700),
        ("0::/", {"memory.max": "max"}, math.inf),
        ("9:memory:/a", {"memory/a/memory.limit_in_bytes": "8", "memory/memory.limit_in_bytes": "9"}, 8),
    ],
)  # fmt: skip
def test_a_container_limits_the_memory(
    tmp_path: Path, line: str, files: dict[str, str], limit: float
) -> None:
    write_groups(tmp_path, line, files)
    assert cores.memory_limit(tmp_path) == limit
