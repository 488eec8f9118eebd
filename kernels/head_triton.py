"""The two row kernels of the head on a GPU: statistics of fp32 logits, and their gradient in place. One pass over memory each.

Offsets are int64, arithmetic fp32; a row may be of any length. Contracts as of `head.row_stats` and `head.row_gradient`.
Shapes: n rows, k of them with a gradient, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


@triton.jit  # type: ignore[untyped-decorator]
def stats_kernel(  # type: ignore[no-untyped-def]
    logits, targets, temperature, logprob, entropy, stats, V, BLOCK: tl.constexpr
):
    """A row per program: top, sum of exp(t) and of t exp(t) with t = (logit - top) / temperature, corrected as top grows."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    inverse = 1.0 / tl.load(temperature + n).to(tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, axis=0))
        shift = tl.where(top == float("-inf"), 0.0, (top - higher) * inverse)
        t = tl.where(z == float("-inf"), 0.0, (z - higher) * inverse)
        p = tl.where(z == float("-inf"), 0.0, tl.exp(t))
        scale = tl.exp(shift)
        weighted = (weighted + total * shift) * scale + tl.sum(p * t, axis=0)
        total = total * scale + tl.sum(p, axis=0)
        top = higher
    chosen = tl.load(row + tl.load(targets + n)).to(tl.float32)
    log_sum = tl.log(total)
    tl.store(logprob + n, (chosen - top) * inverse - log_sum)
    tl.store(entropy + n, log_sum - weighted / total)
    tl.store(stats + 2 * n, top)
    tl.store(stats + 2 * n + 1, log_sum)


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits, out, source, targets, temperature, stats, entropy, g, h, V, BLOCK: tl.constexpr
):
    """A block of a row per program; place `slot` of `out` is for row source[slot]."""
    slot = tl.program_id(0).to(tl.int64)
    n = tl.load(source + slot)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + n * V + v, mask=v < V, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(temperature + n).to(tl.float32)
    log_p = (z - tl.load(stats + 2 * n)) * inverse - tl.load(stats + 2 * n + 1)
    surprise = tl.where(log_p == float("-inf"), 0.0, log_p + tl.load(entropy + n))
    g_n = tl.load(g + n)
    grad = -tl.exp(log_p) * (g_n + tl.load(h + n) * surprise)
    grad = (grad + tl.where(v == tl.load(targets + n), g_n, 0.0)) * inverse
    tl.store(out + slot * V + v, grad.to(out.dtype.element_ty), mask=v < V)


def row_stats(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V] fp32 contiguous, temperature [n] fp32 -> (log-prob [n], entropy [n], stats [n, 2] for the gradient)."""
    n, V = logits.shape
    logprob, entropy, stats = logits.new_empty(n), logits.new_empty(n), logits.new_empty(n, 2)
    stats_kernel[(n,)](
        logits, targets.contiguous(), temperature.contiguous(), logprob, entropy, stats, V, BLOCK=BLOCK, num_warps=WARPS
    )  # fmt: skip
    return logprob, entropy, stats


def row_gradient(
    logits: Tensor, source: Tensor | None, targets: Tensor, temperature: Tensor, stats: Tensor, entropy: Tensor, g: Tensor,
    h: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[k, V] of `dtype`: row i is the gradient of row source[i] (None: i); in the logits' place when that is fp32."""
    n, V = logits.shape
    source = torch.arange(n, device=logits.device) if source is None else source
    k = len(source)
    out = logits[:k] if dtype == logits.dtype else logits.new_empty((k, V), dtype=dtype)
    each = (x.contiguous() for x in (targets, temperature, stats, entropy, g, h))
    gradient_kernel[(k, triton.cdiv(V, BLOCK))](logits, out, source, *each, V, BLOCK=BLOCK, num_warps=WARPS)
    return out


def compile_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, argument types, constexprs, warps) of what is launched, for compiling ahead of time."""
    floats = ("logits", "temperature", "logprob", "stats", "entropy", "g", "h")
    types = dict.fromkeys(floats, "*fp32") | {"targets": "*i64", "source": "*i64", "V": "i32"}
    of = {kernel: {name: types[name] for name in kernel.arg_names if name in types} for kernel in (stats_kernel, gradient_kernel)}
    outs = ({"out": dtype} for dtype in ("*fp32", "*bf16", "*fp16"))
    constants = {"BLOCK": BLOCK}
    return [
        (stats_kernel, of[stats_kernel], constants, WARPS),
        *((gradient_kernel, of[gradient_kernel] | out, constants, WARPS) for out in outs),
    ]
