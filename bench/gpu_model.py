"""What the kernels as they are should reach on one H200: a roofline over every launch of a decode step, of a
prefill and of an update, predicted without a GPU.

    python -m bench.gpu_model [--models 0.6B,4B,8B] [--json] [--save] [--launches] [--kernels]

Launches, bytes and FLOPs are counted by bench/gpu_count.py from the real code on tensors without memory.
"roofline" takes each launch at the chip's rates alone. "predicted" adds what kernels of this form lose: whole
turns of blocks on the multiprocessors, and what these read out of the L2 cache, in all and each; the waits of
a decode step's attention; the gap between two launches; the share of a rate that other kernels reach, an
estimate from their compiled code (SHARES); and what of the host's time the device does not cover. None of it
was measured on a GPU: --save appends to bench/results/gpu_model.csv as "predicted". --kernels shows of what
the time of a decode step is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from duologue.grpo.config import ON_CUDA
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.plan import activation_bytes
from duologue.kernels import ops
from duologue.kernels.gpu.attention_decode import BLOCKS
from duologue.kernels.gpu.linear import CACHE, CACHE_ONE
from duologue.kernels.head import gpu_bytes
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.attention import PagedAttention
from duologue.rollout.engine.decode_gpu import HELD
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows
from bench.gpu_count import Launch, counted
from bench.models import QWEN3, random_qwen3

# One H200. The first two are what a copy of 2 GiB and a product of 8,192^3 reach (bench/gpu_suite.py prints
# them); the data sheet has 4.8e12 and 989e12.
HBM = 4.3e12  # bytes per second
FLOPS = 790e12  # of bf16 products, per second
MULTIPROCESSORS = 132  # data sheet
GRAPH_GAP = (
    1.3e-6  # seconds between dependent kernels of a CUDA graph: NVIDIA, "Constant time launch ...", 2024
)
EAGER_LAUNCH = 6e-6  # seconds of host time per launch of PyTorch's dispatcher
OUR_LAUNCH = 25e-6  # of one of our kernels, with its checks and its autograd node
SHORTEST = 1e-6  # seconds of a kernel that has next to nothing to do: two reads that depend on each other
HOST_STEP = 0.4e-3  # of a decode step of 256 rows (bench/gpu_host.py)
# Of an item of decode attention, seconds in which its block waits and reads nothing: the item, then what it
# names, from the cache (0.25 us each, H100: chipsandcheese.com, 2023); the first keys, from memory under
# load (0.6 us); the products and exponents of the last tile, and what is written (1 us).
ITEM_WAITS = 2 * 0.25e-6 + 0.6e-6 + 1e-6
SHARES = {  # of the rate that bounds a kernel
    "linear_kernel": 0.6,  # cp.async, 3 stages, masks, not persistent
    "linears_kernel": 0.6,
    "gate_up_kernel": 0.6,
    "linear_tma_kernel": 0.7,  # tiles copied by the chip, 3 stages, persistent
    "attention_kernel": 0.45,  # chunks drain the pipeline of loads
    "grad_query_kernel": 0.2,
    "grad_key_kernel": 0.2,
    "_varlen_attn": 0.6,
    "_varlen_attn_backward": 0.45,
    "_flash_attention_backward": 0.4,  # its deterministic form, whose parts of dq are added up at the end
    "mm": 0.9,
    "addmm": 0.9,
}
OTHERS = 0.8

ROWS, CONTEXT, PAGE = 256, 512, 64  # of a decode step
STEPS = 8  # of a call of the engine
PREFILL = 8_192  # tokens of a step
TOKENS, LENGTH = 16_384, 1_024  # of a micro-batch and of its rows, half of whose tokens are trained
PARTS = 8  # micro-batches of an update
RANK = 32
LIBRARY = ON_CUDA["train"]["attention_backward"] == "library"
RECOMPUTE, FUSE = (ON_CUDA["train"][key] for key in ("recompute", "gradient_accumulation_fusion"))
GOALS = {  # tokens per second: rollout, update
    ("0.6B", 0): (48_000, 120_000),
    ("4B", 0): (26_000, 22_000),
    ("8B", 0): (20_000, 0),  # whose update does not fit one device
    ("8B", RANK): (20_000, 12_000),
}


class Cost(NamedTuple):
    """Of launches: what they ask for, and seconds by the rates alone and with what kernels lose."""

    launches: int
    ours: int  # of them by Triton
    bytes: float
    flops: float
    roofline: float
    predicted: float

    def times(self, n: float) -> Cost:
        return Cost(*(round(x * n) if i < 2 else x * n for i, x in enumerate(self)))  # type: ignore[arg-type]

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))  # type: ignore[arg-type]


def roofline(launch: Launch) -> float:
    """Seconds at the chip's rates."""
    return max(launch.bytes / HBM, launch.flops / FLOPS)


def predicted(launch: Launch) -> float:
    """Seconds of the launch alone, without the gap behind it."""
    share = SHARES.get(launch.name, OTHERS)
    if launch.name == "decode_attention_kernel":
        return max(streamed(launch), launch.flops / FLOPS / OTHERS)
    seconds = max(roofline(launch) / share, SHORTEST)
    if launch.loads:
        turns = -(-launch.programs // MULTIPROCESSORS)
        multiplied = launch.flops / launch.programs / (share * FLOPS / MULTIPROCESSORS)
        one = turns * max(multiplied, launch.loads / CACHE_ONE)
        seconds = max(seconds, launch.programs * launch.loads / CACHE, one)
    return seconds


def streamed(launch: Launch) -> float:
    """Seconds of items that are read from memory, BLOCKS of them at a time on a multiprocessor. While one
    waits, the others have its part of the memory's rate: mean value analysis of a closed queue (Reiser and
    Lavenberg 1980), the part being the server and the waits what customers do elsewhere.
    """
    reading = launch.loads * MULTIPROCESSORS / HBM
    queue = rate = 0.0
    for blocks in range(1, BLOCKS + 1):
        at_server = reading * (1 + queue)
        rate = blocks / (at_server + ITEM_WAITS)
        queue = rate * at_server
    return -(-launch.programs // MULTIPROCESSORS) / rate


def cost(launches: Sequence[Launch], gap: float) -> Cost:
    """`gap` seconds behind each launch."""
    return Cost(
        len(launches),
        sum(launch.programs > 0 for launch in launches),
        sum(launch.bytes for launch in launches),
        sum(launch.flops for launch in launches),
        sum(map(roofline, launches)),
        sum(map(predicted, launches)) + gap * len(launches),
    )


# ---- what is run -------------------------------------------------------------------------------------------


def model_of(name: str, layers: int, rank: int, exact: bool) -> Decoder:
    hidden, inner, _, heads = QWEN3[name]
    shape = {"hidden": hidden, "inner": inner, "layers": layers, "heads": heads, "tied": name != "8B"}
    model: Decoder = random_qwen3("meta", torch.bfloat16, **shape)
    if rank:
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank, base=""), 0))
    model.use_exact(exact)
    return model


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def decode(model: Decoder) -> list[Launch]:
    """A step of the engine's own loop: ROWS requests with CONTEXT tokens each, none truncated."""

    def run() -> None:
        engine = Engine(model, page_size=PAGE, cache_tokens=ROWS * (CONTEXT + 2 * PAGE), decode_steps=STEPS)
        engine._weights_seen = engine._weights_counter()
        requests = []
        for i in range(ROWS):
            branch = engine.open([i] * CONTEXT)
            requests.append(engine.start(branch, SamplingParams(max_new_tokens=PAGE, seed=i)))
            engine._scheduler.grow(branch, CONTEXT + PAGE // 2)
            branch.n_cached = CONTEXT - 1
        loop: Any = engine._runner.loop
        assert engine._runner.kv is loop.kv
        buckets.append(loop._filled(requests))

    buckets: list[Any] = []
    counted(run)
    return counted(torch.no_grad()(buckets[0].step), [(1, CONTEXT)] * ROWS)


def prefill(model: Decoder) -> list[Launch]:
    """A step of PREFILL tokens, whole prompts of CONTEXT tokens."""
    S = PREFILL // CONTEXT
    pages = S * CONTEXT // PAGE
    config = model.config
    shape = (config.num_layers, 2, pages, PAGE, config.num_kv_heads, config.head_dim)
    attention = PagedAttention(
        kv=zeros(*shape, dtype=torch.bfloat16),
        slots=zeros(PREFILL),
        block_table=zeros(S, pages // S, dtype=torch.int32),
        cu_seqlens=zeros(S + 1, dtype=torch.int32),
        context_lens=zeros(S, dtype=torch.int32),
        scale=model.scale,
    )
    run = torch.no_grad()(partial(model.hidden, zeros(PREFILL), zeros(PREFILL), attention))
    return counted(run, [(CONTEXT, CONTEXT)] * S)


def gradient(model: Decoder) -> list[Launch]:
    """A micro-batch: forward, loss and backward, and what the optimizer does after it."""
    S = TOKENS // LENGTH
    model.recompute = RECOMPUTE
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0, fuse=FUSE)

    def attention(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        cu_seqlens = zeros(S + 1, dtype=torch.int32)
        return ops.packed_attention(*qkv, cu_seqlens, model.scale, model.exact, LENGTH, LIBRARY)

    def run() -> None:
        hidden = model.hidden(zeros(TOKENS), zeros(TOKENS), attention, model.rows(0))
        before = hidden.index_select(0, zeros(TOKENS // 2))
        loss = ops.linear_policy_loss(
            before,
            model.head_weight,
            zeros(TOKENS // 2),
            lambda logp, *_: logp.sum(),
            exact=model.exact,
            chunk_bytes=gpu_bytes(141 * 10**9),
        ).loss
        optimizer.backward(loss)
        optimizer.accumulate()

    lengths = [(LENGTH, LENGTH)] * S
    counted(run, lengths)  # the first of an update adds nothing up
    return counted(run, lengths)


def kept(name: str, rank: int) -> int:
    """Bytes that a token's forward keeps for its backward."""
    of_layer = model_of(name, 1, rank, exact=True).config
    shape = dataclasses.replace(of_layer, num_layers=QWEN3[name][2])
    sizes = {"nodes": TOKENS, "tokens": TOKENS, "itemsize": 2, "rank": rank}
    return activation_bytes(shape, **sizes, recompute=RECOMPUTE) // TOKENS


def trained(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def whole(run: Callable[[Decoder], list[Launch]], name: str, rank: int, exact: bool, gap: float) -> Cost:
    """Of all layers, which are alike: counted with one and with two."""
    one, two = (cost(run(model_of(name, layers, rank, exact)), gap) for layers in (1, 2))
    return one.plus(two.plus(one.times(-1)).times(QWEN3[name][2] - 1))


def stepping(name: str, rank: int) -> float:
    """Bytes of the optimizer's step: the norm and the clipping of fp32 gradients, AdamW on masters and two
    moments, and weights written back.
    """
    one, two = (trained(model_of(name, layers, rank, exact=True)) for layers in (1, 2))
    parameters = one + (two - one) * (QWEN3[name][2] - 1)
    return parameters * (4.0 + 8.0 + (4 + 3 * 8) + (4 + 2))


# ---- rates -------------------------------------------------------------------------------------------------


def rates(name: str, rank: int, exact: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table."""
    goals = GOALS.get((name, rank), (0, 0))
    of_model = {"model": name, "rank": rank, "exact": exact}

    def row(stage: str, tokens: int, found: Cost, ideal: float, seconds: float, goal: int) -> dict[str, Any]:
        return {
            **of_model,
            "stage": stage,
            "launches": found.launches,
            "gbytes": round(found.bytes / 1e9, 3),
            "tflops": round(found.flops / 1e12, 3),
            "roofline_tokens_per_s": round(tokens / ideal),
            "predicted_tokens_per_s": round(tokens / seconds),
            "goal": goal or "",
            "kind": "predicted",
            "chip": "H200",
        }

    found = whole(decode, name, rank, exact, GRAPH_GAP)
    yield row("decode", ROWS, found, found.roofline, found.predicted + uncovered(found.predicted), goals[0])
    found = whole(prefill, name, rank, exact, 0.0)
    yield row("prefill", PREFILL, found, found.roofline, eager(found), 0)
    found = whole(gradient, name, rank, exact, 0.0)
    step = stepping(name, rank) / HBM / PARTS
    of_update = row("update", TOKENS, found, found.roofline + step, eager(found) + step / OTHERS, goals[1])
    yield of_update | {
        "recompute": RECOMPUTE,
        "fused": FUSE,
        "library_backward": LIBRARY,
        "kept_bytes_per_token": kept(name, rank),
    }


def uncovered(step: float) -> float:
    """Seconds of the host that add to a decode step of the device: those of a call's STEPS that are not
    covered by the last HELD, which run while the host enters what was drawn and plans.
    """
    return max(0.0, HOST_STEP - HELD * step / STEPS)


def eager(found: Cost) -> float:
    """Seconds of launches that the host makes one by one: its own time where that is longer."""
    host = found.ours * OUR_LAUNCH + (found.launches - found.ours) * EAGER_LAUNCH
    return max(found.predicted, host)


def launches_of_layer(name: str, rank: int, exact: bool) -> Counter[str]:
    """Launches of one layer in a decode step, by name."""
    one, two = (decode(model_of(name, layers, rank, exact)) for layers in (1, 2))
    found = Counter(launch.name for launch in two)
    found.subtract(launch.name for launch in one)
    return +found


def kernels(name: str, rank: int, exact: bool) -> str:
    """Of what a decode step is made, the most first: launches, GB, ms by the rates alone, ms predicted."""
    of_kernel: dict[str, Cost] = {}
    one, two = (decode(model_of(name, layers, rank, exact)) for layers in (1, 2))
    nothing = Cost(0, 0, 0.0, 0.0, 0.0, 0.0)
    for launches, n in ((one, 2 - QWEN3[name][2]), (two, QWEN3[name][2] - 1)):
        for launch in launches:
            before = of_kernel.get(launch.name, nothing)
            of_kernel[launch.name] = before.plus(cost([launch], 0.0).times(n))
    gaps = GRAPH_GAP * sum(found.launches for found in of_kernel.values())
    total = gaps + sum(found.predicted for found in of_kernel.values())
    lines = [
        f"{name} rank={rank} exact={exact}: {1e3 * total:.2f} ms, {1e3 * gaps:.2f} of them between launches"
    ]
    for kernel, found in sorted(of_kernel.items(), key=lambda item: -item[1].predicted):
        ms = f"{1e3 * found.roofline:7.3f} {1e3 * found.predicted:7.3f} ms"
        lines.append(f"    {kernel:28} {found.launches:4} {found.bytes / 1e9:8.3f} GB {ms}")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | trained | exact | | launches | GB | TFLOP | roofline tok/s | predicted tok/s | goal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        trained = f"LoRA {r['rank']}" if r["rank"] else "all"
        sizes = f"{r['launches']:,} | {r['gbytes']:,.1f} | {r['tflops']:,.1f}"
        speeds = f"{r['roofline_tokens_per_s']:,} | {r['predicted_tokens_per_s']:,}"
        goal = f"{r['goal']:,}" if r["goal"] else ""
        exact = "yes" if r["exact"] else "no"
        lines.append(f"| {r['model']} | {trained} | {exact} | {r['stage']} | {sizes} | {speeds} | {goal} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="0.6B,4B,8B", help="with commas")
    parser.add_argument("--launches", action="store_true", help="only those of a layer's decode step")
    parser.add_argument("--kernels", action="store_true", help="only those of a decode step, with their time")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="append to bench/results/gpu_model.csv")
    args = parser.parse_args()
    models = args.models.split(",")
    if unknown := [name for name in models if name not in QWEN3]:
        parser.error(f"--models {unknown[0]}: accepted are {', '.join(QWEN3)}")
    if args.launches:
        for name, exact in ((name, exact) for name in models for exact in (True, False)):
            found = launches_of_layer(name, 0, exact)
            print(f"{name} exact={exact}: {found.total()} launches: {dict(found)}")
        return
    if args.kernels:
        print("\n".join(kernels(name, 0, True) for name in models))
        return
    cases = [(name, rank, exact) for name in models for rank in (0, RANK) for exact in (True, False)]
    rows = [row for case in cases for row in rates(*case)]
    print(json.dumps(rows) if args.json else table(rows))
    if args.save:
        append_rows("gpu_model", rows)


if __name__ == "__main__":
    main()
