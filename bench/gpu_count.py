"""What a GPU would be asked to do, counted without one: every launch of a run with its bytes and FLOPs.

The run is the real code on tensors of the meta device, which have shapes and no memory; they say that they
are on CUDA, Triton's launches are recorded where `kernels/gpu/launcher.py` would make them, and PyTorch's own
ops below autograd, each as one launch. Bytes are those of the tensors that a launch reads and writes, each
once: what a cache gives twice is not counted. FLOPs of PyTorch's products are `torch.utils.flop_counter`'s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from duologue.kernels import backend, head, policy_loss
from duologue.kernels.gpu import (
    attention,
    attention_backward,
    attention_decode,
    gather,
    linear,
    rows,
    sampler,
    softmax,
    sparse,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.tools.tensor_descriptor import TensorDescriptor

MODULES = (attention, attention_backward, attention_decode, gather, linear, rows, sampler, softmax, sparse)
PICKS = ("embedding", "index_select", "gather")
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")
CHIP = 90  # an H200's capability
Lengths = Sequence[tuple[int, int]]  # of each sequence: its queries, which are the last of its keys


class Launch(NamedTuple):
    """`programs` of Triton's grid, 0 where PyTorch chooses it; `loads`: bytes that a program reads, whether
    memory or a cache gives them.
    """

    name: str
    bytes: float
    flops: float = 0.0
    programs: int = 0
    loads: float = 0.0


def counted(run: Callable[[], Any], lengths: Lengths = ()) -> list[Launch]:
    """The launches of `run` in order; attention is over sequences of these lengths."""
    recorder = _Recorder(lengths)
    with _on_a_gpu(recorder), recorder:
        run()
    return recorder.launches


@contextlib.contextmanager
def _on_a_gpu(recorder: _Recorder) -> Iterator[None]:
    """Tensors say that they are on CUDA, Triton serves, and nothing is read back from a device."""
    with contextlib.ExitStack() as stack:
        places: list[tuple[Any, str, Any]] = [
            (backend, "_INTERPRETS", True),
            (torch.Tensor, "is_cuda", property(lambda x: True)),
            (head, "Compaction", _AllRows),
            *((module, "check_values", lambda *_: None) for module in (head, policy_loss)),
            *((module, "launch", recorder.launch) for module in MODULES),
            *(
                (module, "capability", lambda _: CHIP)
                for module in (attention, attention_backward, attention_decode, linear)
            ),
        ]
        for place, name, value in places:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


class _AllRows:
    """In place of head.Compaction, which reads a number back: all rows are active."""

    def __init__(self, active: Tensor) -> None:
        self.from_row = torch.empty(active.shape, dtype=torch.int64, device=active.device)

    def count(self) -> int:
        return len(self.from_row)


class _Recorder(TorchDispatchMode):
    def __init__(self, lengths: Lengths) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.lengths = lengths

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> None:
        """As kernels/gpu/launcher.py."""
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        name = kernel.__name__
        own = COSTS.get(name)
        tensors = [getattr(x, "base", x) for x in arguments if isinstance(x, (Tensor, TensorDescriptor))]
        cost = own(named | constants, grid, self.lengths) if own else {}
        self.launches.append(
            Launch(**{"name": name, "bytes": nbytes(tensors), "programs": math.prod(grid), **cost})
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        tensors = [x for x in _tensors((*args, *kwargs.values(), out)) if x.device.type == "meta"]
        if tensors and name not in NO_LAUNCH and not _is_view(func):
            own = LIBRARY.get(name)
            flops = flop_registry.get(getattr(torch.ops.aten, name, None))
            cost = 0.0
            read = nbytes(tensors)
            if name in PICKS:  # of the first tensor as much as comes out
                read = nbytes(tensors) - nbytes(tensors[:1]) + nbytes(tensors[-1:])
            if own is not None:
                cost = own(args, self.lengths)
            elif flops is not None:
                shaped = {k: v for k, v in kwargs.items() if k not in ("out_dtype", "out")}
                operands = [x for x in args if not isinstance(x, torch.dtype)]
                cost = flops(*operands, **shaped, out_val=out)
            self.launches.append(Launch(name, read, cost))
        return out


def _is_view(func: Any) -> bool:
    aliased = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return bool(aliased) and not any(alias.is_write for alias in aliased)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def nbytes(tensors: Iterable[Tensor]) -> float:
    """Each tensor once, though it stands for two arguments."""
    return float(sum({id(x): x.nbytes for x in tensors}.values()))


# ---- what a kernel reads and multiplies where its tensors do not say ---------------------------------------

Named = dict[str, Any]


def tile_pairs(lengths: Lengths, R: int, rows: int, keys: int) -> int:
    """(row, key) pairs of the tiles that attention goes through, for one key head with R query heads."""
    pairs = 0
    for n, context in lengths:
        for x in range(0, n * R, rows):
            last = min(x + rows, n * R) - 1
            seen = context - n + last // R + 1
            pairs += rows * -(-seen // keys) * keys
    return pairs


def _linear(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    M, O, K = x["M"], x["O"], x["K"]
    loads = (min(M, x["ROWS"]) + x["COLUMNS"]) * K * x["x"].element_size()
    whole = math.prod(grid) * x["ROWS"] * x["COLUMNS"]
    return {"flops": 2.0 * max(whole, M * O) * K, "loads": loads}


def _linear_tma(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    """By tiles, whose programs take them in turn."""
    M, O, K = x["M"], x["O"], x["K"]
    tiles = -(-M // x["ROWS"]) * -(-O // x["COLUMNS"])
    loads = (x["ROWS"] + x["COLUMNS"]) * K * x["x"].base.element_size()
    return {"flops": 2.0 * tiles * x["ROWS"] * x["COLUMNS"] * K, "loads": loads, "programs": tiles}


def _of_weights(x: Named, grid: tuple[int, ...], n: int) -> dict[str, float]:
    """Of programs whose rows meet so many weights."""
    columns = n * x["COLUMNS"]
    loads = (min(x["M"], x["ROWS"]) + columns) * x["K"] * x["x"].element_size()
    return {"flops": 2.0 * math.prod(grid) * x["ROWS"] * columns * x["K"], "loads": loads}


def _linears(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return _of_weights(x, grid, 1)


def _gate_up(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return _of_weights(x, grid, 2)


def _linear_sample(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"flops": 2.0 * x["N"] * x["V"] * x["K"]}


def _attention(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    Hq, Hk, D = x["Hq"], x["Hk"], x["D"]
    pairs = tile_pairs(lengths, Hq // Hk, x["ROWS"], x["KEYS"]) * Hk
    numbers = sum(n * Hq + context * 2 * Hk for n, context in lengths) * D
    size = x["q"].element_size()
    tiles = sum(-(-n * Hq // Hk // x["ROWS"]) for n, _ in lengths) * Hk
    read = pairs / x["ROWS"] * 2 * D * size
    return {
        "bytes": numbers * size + nbytes([x["out"], x["stats"]]),
        "flops": 4.0 * pairs * D,
        "loads": read / tiles,
        "programs": tiles,
    }


def _decode_attention(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    """By items of the work list, which share no keys here, and key heads."""
    Hq, Hk, D = x["Hq"], x["Hk"], x["D"]
    size = x["q"].element_size()
    chunks = sum(-(-context // x["CHUNK"]) for _, context in lengths)
    keys = sum(-(-context // x["KEYS"]) * x["KEYS"] for _, context in lengths)
    read = sum(context for _, context in lengths) * 2 * Hk * D * size
    return {
        "bytes": read + chunks * Hq * (D * size + D * 4 + 8),
        "flops": 4.0 * keys * x["ROWS"] * Hk * D,
        "loads": read / (chunks * Hk),
        "programs": chunks * Hk,
    }


def _merge(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    chunks = sum(-(-context // x["CHUNK"]) for _, context in lengths) * x["Hq"]
    return {"bytes": chunks * (x["D"] * 4 + 8) + nbytes([x["out"]])}


def _grad_query(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"flops": 6.0 * tile_pairs(lengths, x["Hq"] // x["Hk"], x["ROWS"], x["KEYS"]) * x["Hk"] * x["D"]}


def _grad_key(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"flops": 8.0 * tile_pairs(lengths, x["Hq"] // x["Hk"], x["ROWS"], x["KEYS"]) * x["Hk"] * x["D"]}


def _rotate(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    tables = len(x["positions"]) * x["D"] * 4
    return {"bytes": nbytes([x["x"], x["out"]]) + tables}


def _rotate_write(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"bytes": 2 * nbytes([x["q"], x["k"], x["v"]]) + len(x["positions"]) * x["D"] * 4}


def _write_kv(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"bytes": 2 * nbytes([x["k"], x["v"]])}


def _sample(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"bytes": 2 * nbytes([x["logits"]])}  # statistics first, then the draw


def _support(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    return {"bytes": nbytes([x["cuts"], x["sizes"]])}  # of rows that nothing truncated


def _add_rows(x: Named, grid: tuple[int, ...], lengths: Lengths) -> dict[str, float]:
    """Of the sums no more rows than there are tokens, read and written."""
    return {"bytes": nbytes([x["x"], x["ranked"], x["places"]]) + 2.0 * x["T"] * x["K"] * 4}


COSTS: dict[str, Callable[[Named, tuple[int, ...], Lengths], dict[str, float]]] = {
    "linear_kernel": _linear,
    "linear_tma_kernel": _linear_tma,
    "add_scaled_kernel": _linear,
    "linears_kernel": _linears,
    "gate_up_kernel": _gate_up,
    "linear_sample_kernel": _linear_sample,
    "attention_kernel": _attention,
    "decode_attention_kernel": _decode_attention,
    "merge_kernel": _merge,
    "grad_query_kernel": _grad_query,
    "grad_key_kernel": _grad_key,
    "rotate_kernel": _rotate,
    "rotate_write_kernel": _rotate_write,
    "write_kv_kernel": _write_kv,
    "add_rows_kernel": _add_rows,
    "sample_kernel": _sample,
    "support_kernel": _support,
}


def _flash(products: int) -> Callable[[Any, Lengths], float]:
    """Of torch's attention, by the triangle alone: q [T, Hq, D] is the first tensor behind a gradient."""

    def flops(args: Any, lengths: Lengths) -> float:
        _, Hq, D = next(x for x in args if isinstance(x, Tensor) and x.dim() == 3).shape
        pairs = sum(n * (context - n) + n * (n + 1) / 2 for n, context in lengths)
        return 2.0 * products * pairs * Hq * D

    return flops


LIBRARY = {  # PyTorch's attention: two products forward, five backward
    "_varlen_attn": _flash(2),
    "_varlen_attn_backward": _flash(5),
    "_flash_attention_forward": _flash(2),
    "_flash_attention_backward": _flash(5),
}
