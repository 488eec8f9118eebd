"""Linear, the norms, rope and the gate: held to float64, to plain PyTorch's own error, and to the bits of a
row computed alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.kernels import backend, ops, reference
from duologue.kernels import linear as kernel
from torch import Tensor

spec = importlib.util.spec_from_file_location(
    "bench_cases", Path(__file__).parent.parent / "bench" / "cases.py"
)
assert spec is not None
assert spec.loader is not None
cases = importlib.util.module_from_spec(spec)
sys.modules["bench_cases"] = cases
spec.loader.exec_module(cases)

OPS = ("linear", "rms_norm", "add_rms_norm", "rope", "silu_mul")
ALL = [case for op in OPS for case in cases.CASES[op] if case.kind == cases.ODD]
ISAS = [isa for isa in backend.ISAS if backend.runs(isa)]
DTYPES = (torch.float32, torch.bfloat16)
needs_cpp = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.use(request.param)
    yield request.param
    backend.use(os.environ.get("DUOLOGUE_CPU", ""))


def outputs_and_gradients(fn: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The op's outputs and the gradients of a fixed random projection of them; tables and positions stay as
    they are."""
    floats = [
        isinstance(a, Tensor) and a.is_floating_point() and not (a.dim() == 2 and a.shape[0] == 256)
        for a in arguments
    ]
    cast = [a.to(dtype).detach().requires_grad_() if f else a for a, f in zip(arguments, floats, strict=True)]
    found = fn(*cast)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    inputs = [c for c, f in zip(cast, floats, strict=True) if f]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, grads)]


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.op} {c.name}")
def test_error_is_at_most_that_of_plain_torch(case: Any, dtype: torch.dtype, isa: str) -> None:
    arguments = case.make(dtype)
    fp64 = tuple(a.double() if isinstance(a, Tensor) and a.dtype == dtype else a for a in arguments)
    exact = outputs_and_gradients(cases.plain(case), fp64, torch.float64)
    theirs = outputs_and_gradients(cases.plain(case), arguments, dtype)
    ours = outputs_and_gradients(cases.ours(case), arguments, dtype)
    n_outputs = 2 if case.op in ("add_rms_norm", "rope") else 1
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        floor = float(e.norm()) * torch.finfo(dtype).eps  # below the rounding of one result nothing is owed
        limit = (2 if i < n_outputs else 3) * float((b.double() - e).norm()) + floor
        assert float((a.double() - e).norm()) <= limit


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [7, 129, 256])
def test_a_row_of_linear_has_the_same_bits_at_every_m(dtype: torch.dtype, K: int, isa: str) -> None:
    x, weight = cases.randn(300, K, dtype=dtype), cases.randn(61, K, dtype=dtype)
    whole = ops.linear(x, weight)
    for m in (1, 2, 3, 4, 5, 7, 16, 64, 127, 129):
        for start in (0, 1, 170):
            assert torch.equal(ops.linear(x[start : start + m], weight), whole[start : start + m])


@needs_cpp
def test_threads_change_no_bit() -> None:
    before = backend.lib().threads()
    found = []
    for threads in (1, 2, 3):
        backend.lib().set_threads(threads)
        for case in (c for op in OPS for c in cases.CASES[op] if "4096" not in c.name):
            found.append(outputs_and_gradients(cases.ours(case), case.make(torch.float32), torch.float32))
    backend.lib().set_threads(before)
    third = len(found) // 3
    for one, two, three in zip(found[:third], found[third : 2 * third], found[2 * third :], strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


@needs_cpp
@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.op} {c.name}")
def test_torch_compile_takes_the_ops_whole(case: Any) -> None:
    arguments = case.make(torch.float32)
    compiled = torch.compile(cases.ours(case), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(cases.ours(case), arguments, torch.float32)
    for a, b in zip(outputs_and_gradients(compiled, arguments, torch.float32), expected, strict=True):
        assert torch.equal(a, b)


@needs_cpp
def test_strided_arguments_give_what_contiguous_ones_give() -> None:
    """A view must be copied and the copy kept alive while the kernel reads it."""
    x, weight, bias = torch.randn(16, 2, 9)[:, 0], torch.randn(9, 4).t(), torch.randn(8)[::2]
    norm, cos, positions = torch.randn(18)[::2], torch.randn(4, 16).t(), torch.arange(32)[::2] % 16
    q = torch.randn(16, 8, 2).transpose(1, 2)
    junk = []
    for call in (
        lambda *a: ops.linear(*a[:3]),
        lambda *a: ops.rms_norm(a[0], a[3], 1e-6),
        lambda *a: ops.rope(a[4], a[4], a[5], a[5], a[6])[0],
    ):
        arguments = (x, weight, bias, norm, q, cos, positions)
        expected = call(*(a.contiguous() for a in arguments))
        for _ in range(20):
            assert torch.equal(call(*arguments), expected)
            junk.append(torch.full((64,), float("nan")))


@needs_cpp
def test_opcheck() -> None:
    x, weight = torch.randn(5, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    norm = torch.randn(9, requires_grad=True)
    q, cos = torch.randn(3, 2, 8, requires_grad=True), torch.randn(16, 4)
    duologue = torch.ops.duologue
    torch.library.opcheck(duologue.linear.default, (x, weight, None, torch.float32))
    torch.library.opcheck(duologue.rms_norm.default, (x, norm, 1e-6))
    torch.library.opcheck(duologue.add_rms_norm.default, (x, x.detach().clone().requires_grad_(), norm, 1e-6))
    torch.library.opcheck(duologue.silu_mul.default, (x, x.detach().clone().requires_grad_()))
    torch.library.opcheck(duologue.rope.default, (q, q.clone(), cos, cos.clone(), torch.arange(3), 1.0))


@needs_cpp
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 5)),
            r"linear: weight has shape \(4, 5\), accepted is \(\*, 3\)",
        ),
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3).bfloat16()),
            "weight is torch.bfloat16, accepted is torch.float32",
        ),
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)),
            r"linear: bias has shape \(3,\), accepted is \(4\)",
        ),
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3, device="meta")), "linear: weight is on meta"),
        (lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6), r"rms_norm: weight has shape \(4,\)"),
        (lambda: ops.silu_mul(torch.ones(2, 3), torch.ones(2, 4)), r"silu_mul: up has shape \(2, 4\)"),
        (
            lambda: ops.rope(
                torch.ones(1, 1, 4),
                torch.ones(1, 1, 4),
                torch.ones(8, 2),
                torch.ones(8, 2),
                torch.tensor([8]),
            ),
            r"rope: positions\[0\] = 8, accepted is 0 to 7",
        ),
        (
            lambda: ops.write_kv(
                *[torch.ones(1, 1, 4)] * 2, *[torch.ones(2, 16, 1, 4)] * 2, torch.tensor([32])
            ),
            r"write_kv: slots\[0\] = 32, accepted is 0 to 31",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_batches_work() -> None:
    assert ops.linear(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)
    bias = torch.arange(40.0)
    assert torch.equal(ops.linear(torch.ones(70, 0), torch.ones(40, 0), bias), bias.expand(70, 40))
    assert ops.rms_norm(torch.ones(0, 3), torch.ones(3), 1e-6).shape == (0, 3)
    assert ops.silu_mul(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("value", ["sse9", "avx1024"])
@needs_cpp
def test_an_unknown_instruction_set_is_refused(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import duologue.kernels.ops"],
        env={**os.environ, "DUOLOGUE_CPU": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    runs = ", ".join(filter(backend.runs, backend.ISAS))
    assert f"DUOLOGUE_CPU = '{value}': accepted is one of {runs} on this machine" in done.stderr


def test_without_the_library_the_definitions_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_lib", None)
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(ops.linear(x, weight), reference.linear(x, weight))
    assert "not built" in backend.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_row_may_have_no_dimension_of_its_own(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(n).to(dtype).requires_grad_() for n in (16, (5, 16), 5))
    found = torch.autograd.grad(ops.linear(x, weight, bias).sum(), (x, weight, bias))
    exact = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).sum(), (x, weight, bias))
    torch.testing.assert_close(found, exact)


class Sharded(torch.Tensor):
    """As DTensor: a shape without memory of its own."""

    @staticmethod
    def __new__(cls, *size: int) -> Sharded:
        made: Sharded = torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.float32, device="cpu")
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def test_a_tensor_without_memory_is_named() -> None:
    """A weight that is sharded is given out whole within its module's forward alone."""
    message = r"a Sharded of shape \(50, 16\) has no memory of its own: accepted is a plain tensor"
    with pytest.raises(ValueError, match=message):
        kernel.forward(torch.randn(5, 16), Sharded(50, 16))
    with pytest.raises(ValueError, match=message):
        backend.pointers(torch.randn(3), None, Sharded(50, 16))
    assert backend.pointers(torch.empty(0), None) == [0, 0]
