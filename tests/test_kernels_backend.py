"""One place says which library serves a tensor, and every public op asks it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from duologue.kernels import backend, linear, ops
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this platform")


def settings(N: int) -> tuple[Tensor, ...]:
    """Of `ops.sample`, half of the rows truncated."""
    n = torch.arange(N)
    return torch.full((N,), 0.7), (n % 2 * 2).int(), torch.ones(N), torch.zeros(N), n + 3, n


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A call of each public op, of tensors of this dtype where the op takes any."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, weight, norm, bias = randn(3, 8), randn(11, 8), randn(8), randn(11)
    q, k, v = randn(3, 4, 8), randn(3, 2, 8), randn(3, 2, 8)
    cos, sin = torch.randn(16, 4, generator=g), torch.randn(16, 4, generator=g)
    pages = torch.zeros(2, 2, 16, 2, 8, dtype=dtype)
    cu_seqlens, lengths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    table = torch.tensor([[1]], dtype=torch.int32)
    targets = torch.tensor([1, 4, 10])
    ids, offsets = torch.tensor([0, 1, 2, 4], dtype=torch.int32), torch.tensor([0, 2, 4, 4])
    rewards, scored = torch.tensor([1.0, 0.0, 2.0]), torch.ones(3, dtype=torch.bool)
    rewards = rewards if dtype.itemsize < 4 else rewards.to(dtype)  # it takes fp32 and float64 alone
    groups = torch.zeros(3, dtype=torch.int64)

    def loss_fn(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return (logprob - entropy).sum()

    of_kv = (q, pages[0], pages[1], table, cu_seqlens, lengths, 0.3)
    return {
        "linear": lambda: ops.linear(x, weight, bias),
        "rms_norm": lambda: ops.rms_norm(x, norm, 1e-6, exact=False),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, norm, 1e-6, exact=False),
        "rope": lambda: ops.rope(q, k, cos, sin, torch.arange(3)),
        "silu_mul": lambda: ops.silu_mul(x, x, exact=False),
        "packed_attention": lambda: ops.packed_attention(q, k, v, cu_seqlens, 0.3, exact=False),
        "write_kv": lambda: ops.write_kv(k, v, pages[0], pages[1], torch.arange(3)),
        "paged_attention": lambda: ops.paged_attention(*of_kv),
        "logprob": lambda: ops.logprob(weight[:, :5], torch.arange(11) % 5),
        "sample": lambda: ops.sample(weight, *settings(11)),
        "sample_bounded": lambda: ops.sample_bounded(weight, *settings(11), 4),
        "head": lambda: ops.head(x, weight, bias, 3.0),
        "linear_logprob": lambda: ops.linear_logprob(x, weight, targets, 0.7, bias, 3.0),
        "linear_policy_loss": lambda: ops.linear_policy_loss(
            x, weight.requires_grad_(), targets, loss_fn, bias=bias, softcap=3.0
        )[:3],
        "linear_sample": lambda: ops.linear_sample(x, weight, *settings(3)),
        "linear_sample whole": lambda: ops.linear_sample(x, weight, *settings(3), exact=False, whole=True),
        "sparse_linear_logprob": lambda: ops.sparse_linear_logprob(
            x, weight, targets[[0, 1, 2]].where(offsets.diff() > 0, 5), ids, offsets, 0.7, bias, 3.0
        ),
        "group_advantages": lambda: ops.group_advantages(rewards, groups, scored, method="std", n_groups=1),
    }


NAMES = sorted(calls(torch.float32))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b is None or torch.equal(a, b)


class Reached(Exception):
    pass


def refuse(*_: Any, **__: Any) -> Any:
    raise Reached


def refuse_cpp() -> Any:
    raise AssertionError("a tensor that is Triton's went to C++")


def test_every_public_op_has_a_call_here() -> None:
    public = {
        name
        for name, value in vars(ops).items()
        if inspect.isfunction(value) and value.__module__ == ops.__name__ and not name.startswith("_")
    }
    assert {name.split()[0] for name in NAMES} == public


@pytest.mark.parametrize(
    ("built", "has_triton", "interprets", "served"),
    [
        (True, True, False, {"cpu": ["cpp", "cpp", "reference"], "cuda": ["triton", "triton", "triton"]}),
        (True, False, False, {"cpu": ["cpp", "cpp", "reference"], "cuda": ["reference"] * 3}),
        (False, True, False, {"cpu": ["reference"] * 3, "cuda": ["triton", "triton", "triton"]}),
        (False, False, False, {"cpu": ["reference"] * 3, "cuda": ["reference"] * 3}),
        (True, True, True, {"cpu": ["triton"] * 3, "cuda": ["triton"] * 3}),
    ],
)
def test_the_rule(
    built: bool,
    has_triton: bool,
    interprets: bool,
    served: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By device, dtype, what is installed and the interpreter; float64 and other devices go to the definition
    always."""
    monkeypatch.setattr(backend, "_lib", backend if built else None)
    monkeypatch.setattr(backend, "_HAS_TRITON", has_triton)
    monkeypatch.setattr(backend, "_INTERPRETS", interprets)
    for device, libraries in served.items():
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        assert [backend.choose(device, dtype) for dtype in dtypes] == libraries
        assert backend.choose(device, torch.float64) == "reference"
    if not interprets:
        assert backend.choose("meta", torch.float32) == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_an_op_goes_to_the_definition_when_it_is_told_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "choose", lambda device, dtype: "reference")
    monkeypatch.setattr(backend, "lib", refuse)
    calls(torch.float32)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_float64_goes_to_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "lib", refuse)
    ours = calls(torch.float64)[name]()
    monkeypatch.setattr(backend, "choose", lambda device, dtype: "reference")
    assert equal(ours, calls(torch.float64)[name]())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted({*NAMES} - {"group_advantages"}))
def test_an_op_goes_to_triton_when_it_is_told_to(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launcher is replaced, so that no kernel is needed; neither library may be asked for anything
    else."""
    for family in ("linear", "rows", "attention", "softmax", "sampler", "sparse"):
        module = importlib.import_module(f"duologue.kernels.gpu.{family}")
        for key, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                monkeypatch.setattr(module, key, refuse)
    monkeypatch.setattr(backend, "choose", lambda device, dtype: "triton")
    monkeypatch.setattr(backend, "lib", refuse_cpp)
    with pytest.raises(Reached):
        calls(dtype)[name]()


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("name", NAMES)
def test_cpu_tensors_go_to_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from duologue.kernels import advantage, attention, linear, rows, softmax, sparse

    monkeypatch.setattr(backend, "lib", refuse)
    for family in (attention, linear, rows, softmax, sparse):
        monkeypatch.setattr(family, "lib", refuse)
    assert advantage.backend is backend
    with pytest.raises(Reached):
        calls(torch.float32)[name]()


def test_what_is_described_is_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_triton, said in ((True, "Triton"), (False, "PyTorch (Triton is not installed)")):
        monkeypatch.setattr(backend, "_HAS_TRITON", has_triton)
        monkeypatch.setattr(backend, "_INTERPRETS", False)
        assert backend.describe("cuda") == said
    assert backend.describe("cpu") == backend.describe()
    assert backend.describe().startswith("C++ " if backend.available() else "PyTorch (")


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
def test_the_stub_says_what_the_library_has() -> None:
    """Names, arguments by number and kind, and what is returned, against what nanobind has bound."""

    def types(function: ast.stmt) -> tuple[list[str], str]:
        assert isinstance(function, ast.FunctionDef)
        arguments = [*function.args.posonlyargs, *function.args.args]
        *kinds, returned = [*(one.annotation for one in arguments), function.returns]
        return [ast.unparse(kind) for kind in kinds if kind], ast.unparse(returned) if returned else ""

    library = backend.lib()
    stub = ast.parse(Path(backend.__file__).with_name("_cpu.pyi").read_text("utf-8"))
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == {name for name in dir(library) if not name.startswith("_")}
    for name, node in functions.items():
        (bound,) = ast.parse(getattr(library, name).__nb_signature__[0][0] + ": ...").body
        kinds, returned = types(bound)
        if node.args.vararg is not None:  # a long list of pointers and sizes, named as a whole
            kinds = []
        assert types(node) == (kinds, returned), name


def test_gradients_are_taken_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.library op costs the host more than a small kernel: it is for graphs that are traced. A second
    derivative, which no kernel has, is refused.
    """

    def dispatched(*_: Any) -> None:
        raise AssertionError("a torch.library op was called")

    monkeypatch.setattr(type(linear.forward_op), "__call__", dispatched)
    x = torch.randn(5, 16, requires_grad=True)
    weight = torch.randn(3, 16, requires_grad=True)
    out = ops.linear(ops.rms_norm(x, torch.ones(16), 1e-6), weight)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    plain = torch.nn.functional.linear(torch.nn.functional.rms_norm(x, (16,), eps=1e-6), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(plain.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
    if backend.library(x) != "reference":
        with pytest.raises(RuntimeError, match=r"once_differentiable|twice"):
            grad.sum().backward()
