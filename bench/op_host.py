"""Microseconds of the host for a call of each differentiable op: all that is not its C++ kernel.

    python -m bench.op_host [--json] [--save]                                                from the root

The library's kernels are replaced by functions that return at once, so what is left are checks, allocations
and autograd; torch's F.linear, whole, stands beside them. Each op is called on small fp32 tensors in a chain
of CHAIN calls, as in layers, each with weights (or keys and values) of its own, whose gradients are handed
over and not added up. The numbers are those of one call, in processor time of this thread: the least and the
median of many rounds of one chain, in which all take turns. --save appends to bench/results/op_host.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from duologue.kernels import backend, ops
from torch import Tensor

from bench.common import append_rows

CHAIN, ROUNDS = 20, 150
SIZE = 64
TOLD = ("multiplies_bf16", "name", "threads", "refused")  # what is asked of the library, and no kernel
Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
Chain = tuple[Tensors, Sequence[Tensors], Step]  # what it begins with, each link's own tensors, a link


@contextmanager
def no_kernels() -> Iterator[None]:
    """The kernels of the C++ library do nothing."""
    library = backend.lib()
    names = [name for name in dir(library) if not name.startswith("_")]
    stubs = {name: getattr(library, name) if name in TOLD else (lambda *_: 0) for name in names}
    with mock.patch.object(backend, "_lib", SimpleNamespace(**stubs)):
        yield


def wanted(*shape: int) -> Tensor:
    """A leaf whose gradient is wanted."""
    return torch.randn(shape, requires_grad=True)


def chains() -> dict[str, Chain]:
    """Of each op, on tensors [SIZE, SIZE] or heads of it."""
    x, other = wanted(SIZE, SIZE), wanted(SIZE, SIZE)
    weights = [(wanted(SIZE, SIZE),) for _ in range(CHAIN)]
    norms = [(wanted(SIZE),) for _ in range(CHAIN)]
    heads = SIZE, 4, SIZE // 4
    q, k = wanted(*heads), wanted(*heads)
    keys = [(wanted(*heads), wanted(*heads)) for _ in range(CHAIN)]
    scale = heads[2] ** -0.5
    table, positions = torch.ones(SIZE, heads[2] // 2), torch.arange(SIZE)
    cu_seqlens = torch.tensor([0, SIZE], dtype=torch.int32)
    return {
        "linear": ((x,), weights, lambda x, weight: (ops.linear(x, weight),)),
        "rms_norm": ((x,), norms, lambda x, norm: (ops.rms_norm(x, norm, 1e-6),)),
        "add_rms_norm": ((x, other), norms, lambda *given: ops.add_rms_norm(*given, 1e-6)),
        "silu_mul": ((x,), weights, lambda x, up: (ops.silu_mul(x, up),)),
        "rope": ((q, k), CHAIN * [()], lambda q, k: ops.rope(q, k, table, table, positions)),
        "packed_attention": (
            (q,),
            keys,
            lambda q, k, v: (ops.packed_attention(q, k, v, cu_seqlens, scale),),
        ),
        "F.linear, whole": ((x,), weights, lambda x, weight: (torch.nn.functional.linear(x, weight),)),
    }


def forward(chain: Chain) -> Tensors:
    tensors, links, step = chain
    for own in links:
        tensors = step(*tensors, *own)
    return tensors


def timed(chain: Chain) -> tuple[float, float, float]:
    """Processor seconds of a link: without gradients, of a forward with them, and of its backward."""
    tensors, links, _ = chain
    leaves = [*tensors, *(x for own in links for x in own)]
    began = time.thread_time()
    with torch.no_grad():
        forward(chain)
    plain = time.thread_time()
    outs = forward(chain)
    forwarded = time.thread_time()
    torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
    ended = time.thread_time()
    return (plain - began) / CHAIN, (forwarded - plain) / CHAIN, (ended - forwarded) / CHAIN


def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row per op, in microseconds."""
    of_ops = chains()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in of_ops}
    for _ in range(rounds):
        for name, chain in of_ops.items():
            timed(chain)  # brings the code into the caches
            found[name].append(timed(chain))
    rows = []
    for name, times in found.items():
        plain, with_grad, backward = (1e6 * min(of) for of in zip(*times, strict=True))
        both = [1e6 * (of[1] + of[2]) for of in times]
        row = {"no_grad_us": plain, "forward_us": with_grad, "backward_us": backward}
        row |= {"both_us": min(both), "median_us": statistics.median(both)}
        rows.append({"op": name} | {key: round(value, 1) for key, value in row.items()})
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
