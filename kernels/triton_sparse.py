"""Log-probs over kept supports on CUDA: the kernels of `duologue::sparse_linear_logprob`, and their launchers.

A program has a row (or, for the weight's gradient, a token) to itself and walks its entries in order: no atomics, so a row's bits
depend on that row alone and gradients are the same in every run.

Shapes: N rows, H hidden, V vocabulary, E kept entries of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from duologue.kernels import reference
from torch import Tensor

ENTRIES, HIDDEN = 32, 128  # of a block


@triton.jit
def _capped(x, softcap):
    """softcap tanh(x / softcap); near 0 by Cephes' polynomial, which keeps the last bits."""
    y = x / softcap
    z = y * y
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(y), 20.0)) + 1.0)
    return softcap * tl.where(tl.abs(y) < 0.625, p * z * y + y, tl.where(y < 0, -far, far))


@triton.jit
def sparse_forward(
    hidden, weight, bias, targets, ids, offsets, temperature, softcap, logprob, entropy, logits, stats, H,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTRIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
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
            w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(tl.float32)
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
        fall = tl.where(total > 0, (top - highest) * inverse, 0.0)  # what has been summed is now this much lower
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
    weight, targets, ids, offsets, temperature, softcap, entropy, logits, stats, grad_logprob, grad_entropy, grad, grad_hidden, H,
    HAS_CAP: tl.constexpr, ENTRIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
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
        w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(tl.float32)
        out += tl.sum(w * g[:, None], 0)
    tl.store(grad_hidden + n * H + h, out.to(grad_hidden.dtype.element_ty), h < H)


@triton.jit
def sparse_weight(
    hidden, order, rows, starts, grad, grad_weight, grad_bias, H,
    HAS_BIAS: tl.constexpr, ENTRIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
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
        x = tl.load(hidden + row[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0).to(tl.float32)
        out += tl.sum(x * g[:, None], 0)
        total += tl.sum(g, 0)
    if end > begin:
        tl.store(grad_weight + v * H + h, out.to(grad_weight.dtype.element_ty), h < H)
        if HAS_BIAS:
            if tl.program_id(1) == 0:
                tl.store(grad_bias + v, total.to(grad_bias.dtype.element_ty))


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ids: Tensor, offsets: Tensor, temperature: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], logits [E], stats [N, 2]). All contiguous; temperature [N]. Rows of all tokens go through torch."""
    N, H = hidden.shape
    logprob, entropy, logits, stats = (hidden.new_empty(n, dtype=torch.float32) for n in (N, N, len(ids), (N, 2)))
    if N:
        sparse_forward[(N,)](
            hidden, weight, hidden if bias is None else bias, targets, ids, offsets, temperature, softcap or 1.0, logprob, entropy,
            logits, stats, H, HAS_BIAS=bias is not None, HAS_CAP=softcap > 0, ENTRIES=ENTRIES, HIDDEN=HIDDEN, num_warps=4,
        )  # fmt: skip
    if len(whole := (offsets.diff() == 0).nonzero()[:, 0]):
        full = reference.head(hidden[whole], weight, bias, softcap)
        logprob[whole], entropy[whole] = reference.logprob(full, targets[whole], temperature[whole])
    return logprob, entropy, logits, stats


def backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ids: Tensor, offsets: Tensor, temperature: Tensor,
    softcap: float, entropy: Tensor, logits: Tensor, stats: Tensor, grad_logprob: Tensor, grad_entropy: Tensor,
    grad_hidden: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Writes grad_hidden [N, H], and into zeros grad_weight [V, H] and grad_bias [V]."""
    (N, H), V = hidden.shape, len(weight)
    if N == 0:
        return
    grad, blocks, flags = torch.empty_like(logits), triton.cdiv(H, HIDDEN), {"ENTRIES": ENTRIES, "HIDDEN": HIDDEN, "num_warps": 4}
    sparse_backward[(N, blocks)](
        weight, targets, ids, offsets, temperature, softcap or 1.0, entropy, logits, stats, grad_logprob, grad_entropy,
        grad, grad_hidden, H, HAS_CAP=softcap > 0, **flags,
    )  # fmt: skip
    if grad_weight is not None:
        ranked, order = ids.long().sort(stable=True)
        starts = torch.searchsorted(ranked, torch.arange(V + 1, device=ranked.device))
        rows = torch.repeat_interleave(torch.arange(N, device=ranked.device), offsets.diff(), output_size=len(ids))
        sparse_weight[(V, blocks)](
            hidden, order, rows, starts, grad, grad_weight, grad if grad_bias is None else grad_bias, H,
            HAS_BIAS=grad_bias is not None, **flags,
        )  # fmt: skip
    if len(whole := (offsets.diff() == 0).nonzero()[:, 0]):
        x, g, h = hidden[whole], grad_logprob[whole, None], grad_entropy[whole, None]
        full = reference.head(x, weight, bias, softcap)
        logp = (full / temperature[whole, None]).log_softmax(-1)
        part = (-logp.exp() * (g + h * (logp + entropy[whole, None]))).scatter_add(1, targets[whole, None], g) / temperature[whole, None]
        part = part * (1 - (full / softcap).square()) if softcap else part
        grad_hidden[whole] = (part @ weight.float()).to(x.dtype)
        if grad_weight is not None:
            grad_weight += (part.T @ x.float()).to(x.dtype)
        if grad_bias is not None:
            grad_bias += part.sum(0).to(x.dtype)


def compile_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its arguments, constants, warps): what the launchers above ask for, to be compiled without a GPU."""
    kinds = {"ids": "*i32", "targets": "*i64", "offsets": "*i64", "order": "*i64", "rows": "*i64", "starts": "*i64", "H": "i32",
             "softcap": "fp32"}  # fmt: skip
    cases = []
    for element in ("*fp32", "*bf16"):
        wide = dict.fromkeys(("hidden", "weight", "bias", "grad_hidden", "grad_weight", "grad_bias"), element)
        for kernel in (sparse_forward, sparse_backward, sparse_weight):
            for on in (False, True):
                flags = {k: on for k in ("HAS_BIAS", "HAS_CAP") if k in kernel.arg_names}
                constants = {**flags, "ENTRIES": ENTRIES, "HIDDEN": HIDDEN}
                names = [name for name in kernel.arg_names if name not in constants]
                cases.append((kernel, {name: {**kinds, **wide}.get(name, "*fp32") for name in names}, constants, 4))
    return cases
