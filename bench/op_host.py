"""Microseconds of the host for a call of each differentiable op: all that is not its C++ kernel.

    python -m bench.op_host [--json] [--save]                                                from the root

The library's kernels are replaced by functions that return at once, so what is left are checks, allocations
and autograd; torch's F.linear, whole, stands beside them. Each op is called on small fp32 tensors in a chain
of CHAIN calls, as in layers; the numbers are those of one call, in processor time of this thread, the least
of several rounds in which all take turns. --save appends to bench/results/op_host.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from duologue.kernels import backend, ops
from torch import Tensor

from bench.common import append_rows

CHAIN, ROUNDS, CALLS = 20, 15, 10
SIZE = 64
TOLD = ("tiles", "name", "threads", "refused")  # what is asked of the library, and no kernel
Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]


@contextmanager
def no_kernels() -> Iterator[None]:
    """The kernels of the C++ library do nothing."""
    library = backend.lib()
    names = [name for name in dir(library) if not name.startswith("_")]
    stubs = {name: getattr(library, name) if name in TOLD else (lambda *_: 0) for name in names}
    with mock.patch.object(backend, "_lib", SimpleNamespace(**stubs)):
        yield


def steps() -> dict[str, tuple[Tensors, Step]]:
    """Of each op what the chain begins with, [SIZE, SIZE] or heads of it, and a function that makes the next
    of it."""
    x, other, weight = (torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(3))
    norm = torch.ones(SIZE, requires_grad=True)
    H, D = 4, SIZE // 4
    q, k, v = (torch.randn(SIZE, H, D, requires_grad=True) for _ in range(3))
    table, positions = torch.ones(SIZE, D // 2), torch.arange(SIZE)
    cu_seqlens = torch.tensor([0, SIZE], dtype=torch.int32)
    return {
        "linear": ((x,), lambda x: (ops.linear(x, weight),)),
        "rms_norm": ((x,), lambda x: (ops.rms_norm(x, norm, 1e-6),)),
        "add_rms_norm": ((x, other), lambda x, total: ops.add_rms_norm(x, total, norm, 1e-6)),
        "silu_mul": ((x,), lambda x: (ops.silu_mul(x, other),)),
        "rope": ((q, k), lambda q, k: ops.rope(q, k, table, table, positions)),
        "packed_attention": ((q,), lambda q: (ops.packed_attention(q, k, v, cu_seqlens, D**-0.5),)),
        "F.linear, whole": ((x,), lambda x: (torch.nn.functional.linear(x, weight),)),
    }


def chained(step: Step, tensors: Tensors) -> Tensors:
    for _ in range(CHAIN):
        tensors = step(*tensors)
    return tensors


def processor_seconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Of one link of these chains."""
    began = time.thread_time()
    for run in runs:
        run()
    return (time.thread_time() - began) / len(runs) / CHAIN


def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row per op: microseconds without gradients, of a forward with them, and of its backward."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for name, (tensors, step) in steps().items():
            forward = partial(chained, step, tensors)
            grads = [torch.ones_like(x) for x in tensors]
            outs = [forward() for _ in range(CALLS)]
            backwards = [partial(torch.autograd.backward, out, grads) for out in outs]
            times = (
                processor_seconds(CALLS * [torch.no_grad()(forward)]),
                processor_seconds(CALLS * [forward]),
                processor_seconds(backwards),
            )
            found.setdefault(name, []).append(times)
    rows = []
    for name, of_rounds in found.items():
        plain, with_grad, backward = (round(1e6 * min(times), 1) for times in zip(*of_rounds, strict=True))
        rows.append(
            {"op": name, "no_grad_us": plain, "forward_us": with_grad, "backward_us": backward}
            | {"both_us": round(with_grad + backward, 1)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="append to bench/results/op_host.csv")
    args = parser.parse_args()
    if not backend.available():
        parser.error("the C++ kernels are not built, there is nothing to take out")
    torch.set_num_threads(1)
    with no_kernels():
        rows = measure()
    if args.json:
        print(json.dumps(rows))
    for row in [] if args.json else rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.save:
        append_rows("op_host", rows)


if __name__ == "__main__":
    main()
