"""Host milliseconds of a decode step of the GPU's loop, with the device taken out of it.

    python -m bench.gpu_host [--rows 256] [--context 512] [--calls 20] [--profile] [--json] [--save]

The engine is the real one on a model of one layer; a step on the device draws tokens that were laid ready, so
what is left is planning, pages, buffers, copies between the two sides and the entry of what was drawn. With
prefixes in groups of 8, as self-play has them.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from duologue.kernels import backend
from duologue.rollout.engine import decode_gpu
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows
from bench.models import random_qwen3

STEPS, PAGE, VOCAB = 8, 64, 1_000


def stubbed(loop: decode_gpu.DeviceLoop, bucket: Any, *_: Any) -> Callable[[], None]:
    """A step that has drawn already."""
    generator = torch.Generator().manual_seed(0)
    shape = bucket.out["token"].shape
    bucket.out["token"].copy_(torch.randint(2, VOCAB, shape, generator=generator))
    bucket.out["logprob"].copy_(-torch.rand(shape, generator=generator))
    bucket.out["entropy"].copy_(torch.rand(shape, generator=generator))
    return lambda: None


def served(x: torch.Tensor) -> bool:
    """In place of `backend.triton`; a Mock takes longer than what is measured."""
    return True


def engine_of(rows: int, context: int, calls: int) -> Engine:
    """With `rows` requests that have the KV of their contexts and go on for `calls` calls."""
    model = random_qwen3(
        "cpu", torch.bfloat16, hidden=64, inner=64, layers=1, heads=1, kv_heads=1, head_dim=16, vocab=VOCAB
    )
    length = context + (calls + 2) * STEPS
    with mock.patch.object(type(model), "paged_layers", return_value=None):
        tokens = rows * (length + 2 * PAGE)
        engine = Engine(model, page_size=PAGE, cache_tokens=tokens, max_batch=rows, decode_steps=STEPS)
    loop: Any = engine._runner.loop
    loop.held = decode_gpu.HELD  # as on CUDA
    generator = torch.Generator().manual_seed(1)
    group: list[int] = []
    for i in range(rows):
        if i % 8 == 0:
            group = torch.randint(2, VOCAB, (context // 2,), generator=generator).tolist()
        own = torch.randint(2, VOCAB, (context - context // 2,), generator=generator).tolist()
        branch = engine.open(group + own)
        request = engine.start(branch, SamplingParams(max_new_tokens=length - context, seed=i))
        engine.pool.find_shared(branch)
        engine._scheduler.grow(branch, context - 1 - branch.n_cached)
        engine.pool.computed(branch, context - 1 - branch.n_cached)
        engine._scheduler.waiting.remove(request)
        engine._scheduler.running.append(request)
    return engine


def seconds_per_step(rows: int, context: int, calls: int, profile: bool = False) -> list[float]:
    """Of each call of STEPS steps, sorted."""
    engine = engine_of(rows, context, calls)
    found = []
    # The groups of shared prefixes are made for Triton alone; the tensors are on the CPU here.
    with (
        mock.patch.object(backend, "triton", served),
        mock.patch.object(decode_gpu.DeviceLoop, "_step_of", stubbed),
    ):
        engine.step()  # makes the buffers
        profiler = cProfile.Profile()
        for _ in range(calls):
            if profile:
                profiler.enable()
            began = time.process_time()
            engine.step()
            found.append((time.process_time() - began) / STEPS)
            profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    read = STEPS * (calls + 1) - decode_gpu.HELD
    assert engine.stats.decode_tokens == rows * read, engine.stats
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="what takes the time")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--save", action="store_true", help="add a row to results/gpu_host.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = seconds_per_step(args.rows, args.context, args.calls, args.profile)
    best, median = (round(1e3 * x, 3) for x in (found[0], statistics.median(found)))
    row = {"rows": args.rows, "context": args.context, "step_ms": median, "least_ms": best}
    if args.save:
        append_rows("gpu_host", [row])
    print(json.dumps(row) if args.json else f"host: {median} ms per decode step ({best} at least), goal 0.3")


if __name__ == "__main__":
    main()
