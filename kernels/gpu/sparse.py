"""Log-probs over kept supports on CUDA: the kernels of `duologue::sparse_linear_logprob`, and their launchers.

A program has a row (or, for the weight's gradient, a token) to itself and walks its entries in order: no atomics, so a row's bits
depend on that row alone and gradients are the same in every run. All tensors are contiguous.

Shapes: N rows, H hidden, V vocabulary, E kept entries of all rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"ENTRIES": 32, "HIDDEN": 128, "num_warps": 4}
# hidden [N, H], weight [V, H], bias [V], targets [N] int64, kept ids [E] int32, their offsets [N + 1] int64, temperature [N] fp32
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _capped(x, softcap):
    """softcap tanh(x / softcap); near 0 by Cephes' polynomial, which keeps the last bits."""
    y = x / softcap
    z = y * y
    p = (
        ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    ) * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(y), 20.0)) + 1.0)
    return softcap * tl.where(tl.abs(y) < 0.625, p * z * y + y, tl.where(y < 0, -far, far))


@triton.jit
def sparse_forward(
    hidden,
    weight,
    bias,
    targets,
    ids,
    offsets,
    temperature,
    softcap,
    logprob,
    entropy,
    logits,
    stats,
    H,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Program n: the logits of row n's support, their online softmax, and the target's log-prob (NaN when it is not kept)."""
    n = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    inverse, target = 1.0 / tl.load(temperature + n), tl.load(targets + n)
    top, total, weighted, chosen = -float("inf"), 0.0, 0.0, 0.0
    found = 0
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        token = tl.load(ids + at, real, 0).to(tl.int64)
        x = tl.zeros((ENTRIES,), tl.float32)
        for h0 in range(0, H, HIDDEN):
            h = h0 + tl.arange(0, HIDDEN)
            w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(
                tl.float32
            )
            x += tl.sum(w * tl.load(hidden + n * H + h, h < H, 0.0).to(tl.float32)[None, :], 1)
        if HAS_BIAS:
            x += tl.load(bias + token, real, 0.0).to(tl.float32)
        if HAS_CAP:
            x = _capped(x, softcap)
        tl.store(logits + at, x, real)
        hit = real & (token == target)
        chosen += tl.sum(tl.where(hit, x, 0.0), 0)
        found += tl.sum(hit.to(tl.int32), 0)
        highest = tl.maximum(top, tl.max(tl.where(real, x, -float("inf")), 0))
        t = tl.where(real, (x - highest) * inverse, -float("inf"))
        p = tl.exp(t)
        fall = tl.where(
            total > 0, (top - highest) * inverse, 0.0
        )  # what has been summed is now this much lower
        weighted = (weighted + total * fall) * tl.exp(fall) + tl.sum(tl.where(real, p * t, 0.0), 0)
        total = total * tl.exp(fall) + tl.sum(p, 0)
        top = highest
    if end > begin:
        log_sum = tl.log(total)
        tl.store(logprob + n, tl.where(found == 1, (chosen - top) * inverse - log_sum, float("nan")))
        tl.store(entropy + n, log_sum - weighted / total)
        tl.store(stats + 2 * n, top)
        tl.store(stats + 2 * n + 1, log_sum)


@triton.jit
def sparse_backward(
    weight,
    targets,
    ids,
    offsets,
    temperature,
    softcap,
    entropy,
    logits,
    stats,
    grad_logprob,
    grad_entropy,
    grad,
    grad_hidden,
    H,
    HAS_CAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Program (n, c): grad_hidden[n] in the c-th block of H; programs (n, 0) also store the products' gradients `grad` [E]."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * HIDDEN + tl.arange(0, HIDDEN)
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    inverse, target = 1.0 / tl.load(temperature + n), tl.load(targets + n)
    slope, push = tl.load(grad_entropy + n) * inverse, tl.load(grad_logprob + n) * inverse
    spread, top, log_sum = tl.load(entropy + n), tl.load(stats + 2 * n), tl.load(stats + 2 * n + 1)
    out = tl.zeros((HIDDEN,), tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        token = tl.load(ids + at, real, 0).to(tl.int64)
        x = tl.load(logits + at, real, 0.0)
        logp = (x - top) * inverse - log_sum
        g = tl.where(token == target, push, 0.0) - tl.exp(logp) * (push + slope * (logp + spread))
        if HAS_CAP:
            g *= 1.0 - (x / softcap) * (x / softcap)
        g = tl.where(real, g, 0.0)
        if tl.program_id(1) == 0:
            tl.store(grad + at, g, real)
        w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(
            tl.float32
        )
        out += tl.sum(w * g[:, None], 0)
    tl.store(grad_hidden + n * H + h, out.to(grad_hidden.dtype.element_ty), h < H)


@triton.jit
def sparse_weight(
    hidden,
    order,
    rows,
    starts,
    grad,
    grad_weight,
    grad_bias,
    H,
    HAS_BIAS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Program (v, c): grad_weight[v] in the c-th block of H, over token v's entries order[starts[v]] and on, in row order."""
    v = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * HIDDEN + tl.arange(0, HIDDEN)
    begin, end = tl.load(starts + v), tl.load(starts + v + 1)
    out, total = tl.zeros((HIDDEN,), tl.float32), 0.0
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        entry = tl.load(order + at, real, 0)
        g = tl.load(grad + entry, real, 0.0)
        row = tl.load(rows + entry, real, 0)
        x = tl.load(hidden + row[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(
            tl.float32
        )
        out += tl.sum(x * g[:, None], 0)
        total += tl.sum(g, 0)
    if end > begin:
        tl.store(grad_weight + v * H + h, out.to(grad_weight.dtype.element_ty), h < H)
        if HAS_BIAS:  # noqa: SIM102
            if tl.program_id(1) == 0:
                tl.store(grad_bias + v, total.to(grad_bias.dtype.element_ty))


def forward(inputs: Inputs, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], logits [E], stats [N, 2]), unwritten for rows without a support."""
    hidden, weight, bias, targets, ids, offsets, temperature = inputs
    N, H = hidden.shape
    out = [hidden.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N,), ids.shape, (N, 2))]
    if N:
        sparse_forward[(N,)](
            hidden,
            weight,
            hidden if bias is None else bias,
            targets,
            ids,
            offsets,
            temperature,
            softcap or 1.0,
            *out,
            H,
            HAS_BIAS=bias is not None,
            HAS_CAP=softcap > 0,
            **LAUNCH,
        )
    return out[0], out[1], out[2], out[3]


def backward(
    inputs: Inputs,
    softcap: float,
    saved: Sequence[Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """Writes the gradients of hidden, and of weight and bias where tokens are kept (elsewhere they are zeros before).

    `saved` are entropy, logits and stats of the forward, and the gradients of log-prob and entropy.
    """
    hidden, weight, _, targets, ids, offsets, temperature = inputs
    (N, H), blocks, grad = (
        hidden.shape,
        triton.cdiv(hidden.shape[1], LAUNCH["HIDDEN"]),
        torch.empty_like(saved[1]),
    )
    if N == 0:
        return
    sparse_backward[(N, blocks)](
        weight,
        targets,
        ids,
        offsets,
        temperature,
        softcap or 1.0,
        *saved,
        grad,
        grads[0],
        H,
        HAS_CAP=softcap > 0,
        **LAUNCH,
    )
    if grads[1] is not None:
        ranked, order = ids.long().sort(stable=True)
        starts = torch.searchsorted(ranked, torch.arange(len(weight) + 1, device=ids.device))
        rows = torch.repeat_interleave(
            torch.arange(N, device=ids.device), offsets.diff(), output_size=len(ids)
        )
        sparse_weight[(len(weight), blocks)](
            hidden,
            order,
            rows,
            starts,
            grad,
            grads[1],
            grad if grads[2] is None else grads[2],
            H,
            HAS_BIAS=grads[2] is not None,
            **LAUNCH,
        )


def compile_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its arguments, constants, warps): what the launchers ask for, to be compiled without a GPU."""
    cases, flags = [], ("HAS_BIAS", "HAS_CAP", "ENTRIES", "HIDDEN")
    for element, kernel, on in product(
        ("*fp32", "*bf16"), (sparse_forward, sparse_backward, sparse_weight), (False, True)
    ):
        types = {"ids": "*i32", "H": "i32", "softcap": "fp32"}
        types |= dict.fromkeys(("targets", "offsets", "order", "rows", "starts"), "*i64")
        types |= dict.fromkeys(
            ("hidden", "weight", "bias", "grad_hidden", "grad_weight", "grad_bias"), element
        )
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in flags}
        constants = {name: LAUNCH.get(name, on) for name in kernel.arg_names if name in flags}
        cases.append((kernel, signature, constants, LAUNCH["num_warps"]))
    return cases
