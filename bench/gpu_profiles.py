"""Where the time goes on a GPU: the stages of bench/gpu_first.py and bench/gpu_second.py that measure.

    python -m bench.gpu_profiles decode-0.6B|update-0.6B|...|ceilings|tiles|warps --device cuda --out FOLDER

Graph replays and queued calls are timed by events, so that what is measured is the device's; what the host
takes stands beside it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row, pack
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import libraries, ops
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from torch import Tensor

from bench.common import calls, ceilings, quantiles
from bench.gpu_driver import Place, stage_main
from bench.gpu_stages import TINY
from bench.models import qwen3, random_qwen3

KERNELS = 14  # of a profile that are named


def model_of(place: Place, name: str) -> Decoder:
    if place.dry:
        Decoder.paged_layers = lambda self: None  # type: ignore[method-assign]  # the GPU's loop, on the CPU
        return random_qwen3(place.device, torch.float32, **TINY)
    return qwen3(name, place.device)


def wait(place: Place) -> None:
    if place.device != "cpu":
        torch.cuda.synchronize()


def micros(place: Place, run: Callable[[], Any], seconds: float = 0.3) -> float:
    """The median of a call."""
    if place.dry:
        seconds = 0.0
    return round(quantiles(calls(run, seconds=seconds, device=place.device))[1] * 1e6, 1)


def kernels_of(place: Place, run: Callable[[], Any], times: int) -> dict[str, Any]:
    """The kernels of `run`, by their time: [name, us of a run, launches of a run]; and the time of all."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if place.device == "cpu" else [activity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(times):
            run()
        wait(place)
    key = "self_cpu_time_total" if place.device == "cpu" else "self_device_time_total"
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))
    found = [[e.key[:60], round(getattr(e, key) / times, 1), round(e.count / times, 1)] for e in events]
    return {"device_us": round(sum(row[1] for row in found)), "kernels": found[:KERNELS]}


# ---- decode ------------------------------------------------------------------------------------------------


def decode(name: str, place: Place) -> None:
    """A step of a batch in its steady state: engine, graph replays alone, and their kernels."""
    model = model_of(place, name)
    batches, context = ((3,), 24) if place.dry else ((1, 16, 64, 128, 256), 512)
    page, steps = (16, 8) if place.dry else (64, 8)
    tokens = batches[-1] * (context + 6 * steps + 2 * page)
    engine = Engine(
        model, page_size=page, cache_tokens=tokens, max_batch=512, max_step_tokens=8192, decode_steps=steps
    )
    for batch in batches:
        what = f"{name}, {batch} rows, context {context}"
        place.rows.check(f"decode-{name}", what, partial(decode_rows, place, engine, batch, context))


@torch.no_grad()
def decode_rows(place: Place, engine: Engine, batch: int, context: int) -> dict[str, Any]:
    loop: Any = engine._runner.loop
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, context)
    prompts = torch.randint(0, engine.model.config.vocab_size, shape, generator=generator).tolist()
    branches = [engine.open(prompt) for prompt in prompts]
    began = time.perf_counter()
    engine.prefill(branches)
    prefilled = time.perf_counter() - began
    for i, branch in enumerate(branches):
        engine.start(branch, SamplingParams(max_new_tokens=5 * loop.steps, seed=i))
    engine.step()
    engine.step()  # captured by now
    before = engine.stats.decode_tokens
    began = time.perf_counter()
    engine.step()
    seconds, taken = time.perf_counter() - began, engine.stats.decode_tokens - before
    ((_, bucket),) = [(k, b) for k, b in loop._buckets.items() if len(b.rows.last) >= batch][-1:]
    state = bucket.rows.state.clone()

    def replay() -> None:
        bucket.step_index.zero_()
        bucket.rows.state.copy_(state)
        for _ in range(loop.steps):
            bucket.step()

    step_us = micros(place, replay) / loop.steps
    profile = kernels_of(place, replay, 1)
    engine.abort()
    for branch in branches:
        branch.close()
    profile["device_us"] = round(profile["device_us"] / loop.steps, 1)
    return {
        "tokens_per_s": round(taken / seconds),
        "step_us": round(step_us, 1),
        "engine_step_us": round(seconds * 1e6 / loop.steps, 1),
        "prefill_tokens_per_s": round(batch * context / prefilled),
        **profile,
    }


# ---- update ------------------------------------------------------------------------------------------------


def update_rows(model: Decoder, tokens: int, length: int) -> list[Row]:
    """Rows of `length` tokens in groups of 8 that share a quarter; of the rest two thirds are trained."""
    generator = torch.Generator().manual_seed(0)
    V = model.config.vocab_size
    rows: list[Row] = []
    start: list[int] = []
    for i in range(max(tokens // length, 2)):
        if i % 8 == 0:
            start = torch.randint(0, V, (length // 4,), generator=generator).tolist()
        rest = torch.randint(0, V, (length - length // 4,), generator=generator).tolist()
        mask = [False] * len(start) + [at % 3 > 0 for at in range(len(rest))]
        rows.append(
            Row(
                token_ids=start + rest,
                loss_mask=mask,
                logprobs=[-11.9 * trained for trained in mask],
                advantage=1.0 if i % 2 else -1.0,
                dialogue_id=i,
                role=0,
            )
        )
    return rows


def update(name: str, place: Place, rank: int = 0) -> None:
    """A micro-batch of 16k tokens, exact and not, and the optimizer's step; with `rank` an adapter's."""
    model: Decoder = model_of(place, name)
    if rank:
        settings = LoraSettings(rank=rank, base="")
        model = LoraDecoder(model, new_adapter(model, settings, 0))
    stage = f"update-{name}{'-lora' if rank else ''}"
    rows = update_rows(model, 64 if place.dry else 16_384, 24 if place.dry else 1_024)
    for exact in (True, False):
        model.use_exact(exact)
        place.rows.check(stage, f"exact = {str(exact).lower()}", partial(update_once, place, model, rows))


def update_once(place: Place, model: Decoder, rows: list[Row]) -> dict[str, Any]:
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
    tokens = sum(len(row.token_ids) for row in rows)

    def gradient() -> None:
        accumulate_policy_gradient(
            model,
            rows,
            LossConfig(variant="dapo"),
            temperature=1.0,
            max_tokens=tokens,
            after_part=optimizer.accumulate,
        )
        wait(place)

    def timed(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        wait(place)
        return time.perf_counter() - began

    timed(gradient)
    if place.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(timed(gradient) for _ in range(1 if place.dry else 3))
    peak = torch.cuda.max_memory_allocated() if place.device != "cpu" else 0
    packing = min(timed(lambda: pack(rows, place.device)) for _ in range(2))
    profile = kernels_of(place, gradient, 1)
    stepping = timed(lambda: optimizer.step(1e-5))
    optimizer.close()
    return {
        "tokens_per_s": round(tokens / seconds),
        "ms": round(seconds * 1e3, 1),
        "pack_ms": round(packing * 1e3, 1),
        "optimizer_ms": round(stepping * 1e3, 1),
        "idle_share": round(1 - profile["device_us"] / seconds / 1e6, 3),
        "peak_gb": round(peak / 1e9, 1),
        **profile,
    }


# ---- kernels -----------------------------------------------------------------------------------------------


def measure_ceilings(place: Place) -> None:
    bandwidth, rate = ceilings(place.device, tiny=place.dry)
    place.rows.add("ceilings", bytes_per_s=bandwidth, flops_per_s=rate)


def interpreted(place: Place) -> torch.dtype:
    """The dtype of what runs Triton's kernels directly: where there is no GPU in its interpreter."""
    assert place.device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    return torch.float16 if place.dry else torch.bfloat16


TILES = (  # rows, columns, warps, stages
    (64, 16, 4, 6),
    (64, 32, 4, 6),
    (64, 64, 4, 4),
    (128, 32, 4, 4),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (256, 64, 8, 3),
    (256, 128, 8, 3),
)
WEIGHTS = ((1024, 1024), (3072, 1024), (4096, 4096), (12_288, 4096), (4096, 12_288))  # O, K


def tiles(place: Place) -> None:
    """`linear` by candidate tiles (rows, columns, warps, stages): microseconds, and whether the bits are the
    same."""
    from duologue.kernels.gpu import linear

    dtype = interpreted(place)
    for O, K in ((40, 70),) if place.dry else WEIGHTS:
        weight = torch.randn(O, K, device=place.device).to(dtype) / K**0.5
        for M in (3,) if place.dry else (16, 64, 128, 256, 512):
            x = torch.randn(M, K, device=place.device).to(dtype)
            expected = ops.linear(x, weight)
            found: dict[str, Any] = {}
            same = True
            for rows, columns, warps, stages in TILES[:2] if place.dry else TILES:
                tile = {"ROWS": rows, "COLUMNS": columns, "STEP": 64}
                tile |= {"num_warps": warps, "num_stages": stages}
                with mock.patch.object(linear, "tile", lambda *_, tile=tile: tile):
                    same &= torch.equal(ops.linear(x, weight), expected)
                    found[f"{rows}x{columns}"] = micros(place, partial(ops.linear, x, weight), 0.05)
            found["now"] = micros(place, partial(ops.linear, x, weight), 0.05)
            found["torch"] = micros(place, partial(torch.mm, x, weight.t()), 0.05)
            place.rows.add("tiles", M=M, O=O, K=K, ok=same, us=found)


def warps(place: Place) -> None:
    """Attention at head dim 128 with 4 and with 8 warps, forward and backward; and a library's backward."""
    from duologue.kernels.gpu import attention, attention_backward

    dtype, before = interpreted(place), attention.tile
    D, T, Hq, Hk = (32, 20, 2, 1) if place.dry else (128, 16_384, 32, 8)
    lengths = torch.tensor([0, T // 2, T], dtype=torch.int32, device=place.device)
    q, k, v = (torch.randn(T, h, D, device=place.device).to(dtype).requires_grad_() for h in (Hq, Hk, Hk))

    def tiled(warps: int) -> Callable[..., dict[str, Any]]:
        return lambda *sizes: {**before(*sizes), "num_warps": warps}

    def forward() -> Tensor:
        return ops.packed_attention(q, k, v, lengths, D**-0.5)

    outputs: list[Tensor] = []
    for number in (4, 8):
        with (
            mock.patch.object(attention, "tile", tiled(number)),
            mock.patch.object(attention_backward, "tile", tiled(number)),
        ):
            out = forward()
            grads = torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True)
            outputs += [out.detach(), *grads]
            backward = partial(torch.autograd.grad, out, (q, k, v), out.detach(), retain_graph=True)
            found = {"forward": micros(place, forward, 0.2), "backward": micros(place, backward, 0.2)}
        place.rows.add("warps", warps=number, D=D, T=T, us=found)
    same = [torch.equal(a, b) for a, b in zip(outputs[:4], outputs[4:], strict=True)]
    place.rows.add("warps", same_bits=same)
    if libraries.attention_backward(q) is None:
        place.rows.add("warps", library=libraries.describe_attention_backward())
        return
    out = ops.packed_attention(q, k, v, lengths, D**-0.5, True, T // 2, True)
    backward = partial(torch.autograd.grad, out, (q, k, v), out.detach(), retain_graph=True)
    serving = libraries.describe_attention_backward()
    place.rows.add("warps", library=serving, us={"backward": micros(place, backward, 0.2)})


def named() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for name in ("0.6B", "4B", "8B"):
        yield f"decode-{name}", partial(decode, name)
        yield f"update-{name}", partial(update, name)
        yield f"update-{name}-lora", partial(update, name, rank=32)


STAGES = {**dict(named()), "ceilings": measure_ceilings, "tiles": tiles, "warps": warps}

if __name__ == "__main__":
    sys.exit(stage_main(STAGES))
