"""Which library serves a tensor, asked here by every op; the C++ library itself; the check of arguments; and
the `torch.library` op of a kernel.

    device  dtype             served by       where it is missing
    cpu     fp32, bf16        C++             PyTorch (no compiler when duologue was installed)
    cuda    fp32, bf16, fp16  Triton          PyTorch
    any     all others        PyTorch: kernels/reference.py, in the tensor's own precision

With TRITON_INTERPRET=1 Triton's interpreter serves its dtypes on CPU too, in place of C++: slow, for tests.

`DUOLOGUE_CPU=generic|avx2|avx512|avx512-nobf16|avx512bf16|amx|amx-emulated` forces an instruction set (read
here, once); without it the best that runs is used. "avx512" is the best without tiles, "avx512-nobf16" what
every processor with AVX-512 has; "amx-emulated" computes what AMX does, bit for bit in its products, on any
processor, and is slow: for tests.
"""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from duologue.kernels import cores
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef, custom_op  # type: ignore[attr-defined]

try:
    import duologue.kernels._cpu as _built

    _lib: ModuleType | None = _built
except ImportError:
    _lib = None

Library = Literal["cpp", "triton", "reference"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of the C++ kernels, and their numbers there
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512", "avx512-nobf16", "avx512bf16", "amx", "amx-emulated")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETS = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def choose(device: str, dtype: torch.dtype) -> Library:
    """The library that serves tensors of this type of device and this dtype."""
    if _INTERPRETS or (device == "cuda" and _HAS_TRITON):
        return "triton" if dtype in TRITON_DTYPES else "reference"
    return "cpp" if _lib is not None and device == "cpu" and dtype in DTYPES else "reference"


def device_type(x: Tensor) -> str:
    """x.device.type, on CPU in a fifth of its time."""
    return "cpu" if x.is_cpu else x.device.type


def library(x: Tensor) -> Library:
    """The library that serves `x`."""
    return choose(device_type(x), x.dtype)


def cpp(x: Tensor) -> bool:
    """Whether the C++ kernels serve `x`."""
    return library(x) == "cpp"


def triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve `x`."""
    return library(x) == "triton"


def multiplies_bf16(x: Tensor) -> bool:
    """Whether C++ takes `x` as it is in the products of gradients: bf16, by AMX or AVX-512 BF16."""
    return x.dtype == torch.bfloat16 and cpp(x) and bool(lib().multiplies_bf16())


def describe(device: str = "cpu") -> str:
    """One line on what serves the fp32 and 16-bit tensors of "cpu" or "cuda"."""
    served_by = choose(device, torch.bfloat16)
    if served_by == "triton":
        return "Triton's interpreter" if _INTERPRETS else "Triton"
    if served_by == "cpp":
        reason = lib().refused()
        without = f" (no AMX: {reason})" if reason else ""
        return f"C++ {lib().name()}, {lib().threads()} threads{without}"
    missing = "Triton is not installed" if device == "cuda" else "the C++ kernels are not built"
    return f"PyTorch ({missing})"


# ---- the C++ library ---------------------------------------------------------------------------------------


def available() -> bool:
    """Whether the C++ kernels were built."""
    return _lib is not None


def lib() -> ModuleType:
    assert _lib is not None
    return _lib


def use(isa: str) -> None:
    """Choose the instruction set by name; "" is the best that runs here."""
    if _lib is None:
        raise ValueError(f"DUOLOGUE_CPU = {isa!r}: the C++ kernels are not built, nothing can be chosen")
    if not _lib.use(isa):
        accepted = ", ".join(filter(runs, ISAS))
        raise ValueError(f"DUOLOGUE_CPU = {isa!r}: accepted is one of {accepted} on this machine")


def runs(isa: str) -> bool:
    """Whether this machine can run the instruction set of this name."""
    if _lib is None:
        return False
    before = isa_name()
    found = bool(_lib.use(isa))
    _lib.use(before)
    return found


def isa_name() -> str:
    """The name by which `use` finds the instruction set that serves."""
    name: str = lib().name()
    return "avx512-nobf16" if name == "avx512" else name


def instruction_set(device: str, dtype: torch.dtype) -> str:
    """The instruction set that decides the bits of what is computed, as DUOLOGUE_CPU names it: all that have
    AVX-512 compute fp32 alike; "" where the C++ kernels do not serve."""
    if choose(device, dtype) != "cpp":
        return ""
    name = isa_name()
    if dtype == torch.bfloat16:
        return name
    return {"avx512-nobf16": "avx512", "avx512bf16": "avx512", "amx": "avx512"}.get(name, name)


if os.environ.get("DUOLOGUE_CPU"):
    use(os.environ["DUOLOGUE_CPU"])
if _lib is not None and _lib.threads() > cores.thread_count():
    _lib.set_threads(cores.thread_count())


def address(x: Tensor) -> int:
    """Where it lies. ValueError for one that lies nowhere, as a part of a sharded one does."""
    place = x.data_ptr()
    if not place and x.numel():
        kind, shape = type(x).__name__, tuple(x.shape)
        raise ValueError(
            f"a {kind} of shape {shape} has no memory of its own: accepted is a plain tensor, "
            "such as a sharded weight is within its module's forward, or its full_tensor()"
        )
    return place


def pointers(*tensors: Tensor | None) -> list[int]:
    """Their addresses, 0 for None. The tensors must stay alive while these are used."""
    return [0 if x is None else address(x) for x in tensors]


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes microseconds to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


# ---- contracts ---------------------------------------------------------------------------------------------


def check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap = {softcap}, accepted is None or a finite number above 0")


# a tensor, None where it is not given; its shape, None for any size; its dtype, None for any
Contract = tuple[Tensor | None, tuple[int | None, ...], torch.dtype | None]


def _fits(sizes: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(shape):
        return False
    fits = True
    for size, wanted in zip(sizes, shape, strict=True):  # in all() it would take twice as long
        if size != wanted and wanted is not None:
            fits = False
    return fits


def check(op: str, device: str, **arguments: Contract) -> None:
    """Raise ValueError unless each tensor that is given has its shape (None = any size), its dtype (None =
    any) and this type of device."""
    on_cpu = device == "cpu"
    for name, (x, shape, dtype) in arguments.items():
        if x is None:
            continue
        sizes = x.shape
        if sizes != shape and not _fits(sizes, shape):
            accepted = ", ".join("*" if size is None else str(size) for size in shape)
            raise ValueError(f"{op}: {name} has shape {tuple(sizes)}, accepted is ({accepted})")
        if x.dtype != dtype and dtype is not None:
            raise ValueError(f"{op}: {name} is {x.dtype}, accepted is {dtype}")
        if not (on_cpu and x.is_cpu) and x.device.type != device:
            raise ValueError(f"{op}: {name} is on {x.device}, but the other arguments are on {device}")


# ---- torch.library -----------------------------------------------------------------------------------------


def library_op(name: str, kernel: Callable[..., Any], *like: int, schema: str | None = None) -> CustomOpDef:
    """The op duologue::NAME, whose outputs are like its inputs number `like`; with none of these, the caller
    registers the fake. `schema` is read off the kernel's annotations where it is not given."""
    op = custom_op(f"duologue::{name}", kernel, mutates_args=(), schema=schema)

    def fake(*inputs: Any) -> Any:
        outputs = [torch.empty_like(inputs[i], memory_format=torch.contiguous_format) for i in like]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    if like:
        op.register_fake(fake)
    return op


def with_gradients(
    op: CustomOpDef,
    kernel: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    of_op: Callable[..., Any],
    of_kernel: Callable[..., Any],
    first: bool = False,
) -> Callable[..., Any]:
    """`op` with its gradients: in a graph that is traced the op itself, otherwise a torch.autograd.Function
    of its kernel, which takes the host a sixth of the op's time.

    backward(run, ctx, *grads) calls `run`: the op of the gradients, `of_op`, or their kernel, `of_kernel`.
    With `first` the first output is what is returned, and others, without gradients, are for the backward.
    """

    def setup_of_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)
        if first:
            ctx.mark_non_differentiable(*output[1:])

    op.register_autograd(partial(backward, of_op), setup_context=setup_of_op)

    # Without a setup_context, with which `apply` binds the signature at each call.
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        setup(ctx, inputs, output)
        return output[0] if first else output

    plain = partial(backward, of_kernel)
    refusing = once_differentiable(plain)  # a second derivative; it takes longer than a small op's forward

    def gradients(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else plain(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    bases = (torch.autograd.Function,)
    function: Any = types.new_class(kernel.__name__, bases, exec_body=lambda body: body.update(members))
    # What Function.apply calls in the end, a third of the host's time earlier.
    apply = super(torch.autograd.Function, function).apply

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)[0] if first else op(*inputs)
        transformed = torch._C._are_functorch_transforms_active()  # which Function.apply refuses
        return function.apply(*inputs) if transformed else apply(*inputs)

    return run
