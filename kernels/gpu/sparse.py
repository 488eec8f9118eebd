"""Log-probs over kept supports on CUDA: the kernels of `duologue::sparse_linear_logprob`, and their
launchers.

A program has a row (or, for the weight's gradient, a token) to itself and walks its entries in order: no
atomics, so a row's bits depend on that row alone and gradients are the same in every run. All tensors are
contiguous.

Shapes: N rows, H hidden, V vocabulary, E kept entries of all rows.
"""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from duologue.kernels.gpu.softmax import capped
from torch import Tensor

LAUNCH = {"ENTRIES": 32, "HIDDEN": 128, "num_warps": 4}
# hidden [N, H], weight [V, H], bias [V], targets [N] int64, kept ids [E] int32, their offsets [N + 1] int64,
# temperature [N] fp32
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def sparse_forward(
    hidden,
    weight,
    bias,
    targets,
    ids,
    offsets,
    temperatures,
    softcap,
    logprobs,
    entropies,
    logits,
    stats,
    H,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Program n: the logits of row n's support, their online softmax, and the target's log-prob (NaN when it
    is not kept)."""
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    inverse = 1.0 / tl.load(temperatures + n)
    target = tl.load(targets + n)
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    chosen = 0.0
    hits = 0
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        token = tl.load(ids + at, real, 0).to(tl.int64)
        x = tl.zeros((ENTRIES,), tl.float32)
        for h0 in range(0, H, HIDDEN):
            h = h0 + tl.arange(0, HIDDEN)
            w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0)
            w = w.to(tl.float32)
            x += tl.sum(w * tl.load(hidden + n * H + h, h < H, 0.0).to(tl.float32)[None, :], 1)
        if HAS_BIAS:
            x += tl.load(bias + token, real, 0.0).to(tl.float32)
        if HAS_CAP:
            x = capped(x, softcap)
        tl.store(logits + at, x, real)
        hit = real & (token == target)
        chosen += tl.sum(tl.where(hit, x, 0.0), 0)
        hits += tl.sum(hit.to(tl.int32), 0)
        highest = tl.maximum(top, tl.max(tl.where(real, x, -float("inf")), 0))
        t = tl.where(real, (x - highest) * inverse, -float("inf"))
        p = tl.exp(t)
        delta = tl.where(total > 0, (top - highest) * inverse, 0.0)  # what has been summed is lower by this
        weighted = (weighted + total * delta) * tl.exp(delta) + tl.sum(tl.where(real, p * t, 0.0), 0)
        total = total * tl.exp(delta) + tl.sum(p, 0)
        top = highest
    if end > begin:
        log_sum = tl.log(total)
        tl.store(logprobs + n, tl.where(hits == 1, (chosen - top) * inverse - log_sum, float("nan")))
        tl.store(entropies + n, log_sum - weighted / total)
        tl.store(stats + 2 * n, top)
        tl.store(stats + 2 * n + 1, log_sum)


@triton.jit
def sparse_backward(
    weight,
    targets,
    ids,
    offsets,
    temperatures,
    softcap,
    entropies,
    logits,
    stats,
    grad_logprobs,
    grad_entropies,
    grad,
    grad_hidden,
    H,
    HAS_CAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Program (n, c): grad_hidden[n] in the c-th block of H; programs (n, 0) also store the products'
    gradients `grad` [E]."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * HIDDEN + tl.arange(0, HIDDEN)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    inverse = 1.0 / tl.load(temperatures + n)
    target = tl.load(targets + n)
    grad_entropy = tl.load(grad_entropies + n) * inverse
    grad_logprob = tl.load(grad_logprobs + n) * inverse
    entropy = tl.load(entropies + n)
    top = tl.load(stats + 2 * n)
    log_sum = tl.load(stats + 2 * n + 1)
    out = tl.zeros((HIDDEN,), tl.float32)
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        token = tl.load(ids + at, real, 0).to(tl.int64)
        x = tl.load(logits + at, real, 0.0)
        logp = (x - top) * inverse - log_sum
        at_target = tl.where(token == target, grad_logprob, 0.0)
        g = at_target - tl.exp(logp) * (grad_logprob + grad_entropy * (logp + entropy))
        if HAS_CAP:
            g *= 1.0 - (x / softcap) * (x / softcap)
        g = tl.where(real, g, 0.0)
        if tl.program_id(1) == 0:
            tl.store(grad + at, g, real)
        w = tl.load(weight + token[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0)
        out += tl.sum(w.to(tl.float32) * g[:, None], 0)
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
    """Program (v, c): grad_weight[v] in the c-th block of H, over token v's entries order[starts[v]] and on,
    in row order."""
    v = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * HIDDEN + tl.arange(0, HIDDEN)
    begin = tl.load(starts + v)
    end = tl.load(starts + v + 1)
    out = tl.zeros((HIDDEN,), tl.float32)
    total = 0.0
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        real = at < end
        entry = tl.load(order + at, real, 0)
        g = tl.load(grad + entry, real, 0.0)
        row = tl.load(rows + entry, real, 0)
        x = tl.load(hidden + row[:, None] * H + h[None, :], real[:, None] & (h < H)[None, :], 0.0)
        out += tl.sum(x.to(tl.float32) * g[:, None], 0)
        total += tl.sum(g, 0)
    if end > begin:
        tl.store(grad_weight + v * H + h, out.to(grad_weight.dtype.element_ty), h < H)
        if HAS_BIAS:  # noqa: SIM102
            if tl.program_id(1) == 0:
                tl.store(grad_bias + v, total.to(grad_bias.dtype.element_ty))


def forward(inputs: Inputs, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], logits [E], stats [N, 2]), unwritten for rows without a support."""
    hidden, weight, bias, *support = inputs
    N, H = hidden.shape
    logprob, entropy = (hidden.new_empty(N, dtype=torch.float32) for _ in range(2))
    logits = hidden.new_empty(support[1].shape, dtype=torch.float32)
    stats = hidden.new_empty((N, 2), dtype=torch.float32)
    if N:
        head = (hidden, weight, hidden if bias is None else bias)
        flags = {"HAS_BIAS": bias is not None, "HAS_CAP": softcap > 0}
        out = (logprob, entropy, logits, stats)
        launch(sparse_forward, (N,), *head, *support, softcap or 1.0, *out, H, **flags, **LAUNCH)
    return logprob, entropy, logits, stats


def backward(
    inputs: Inputs,
    softcap: float,
    saved: Sequence[Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """Writes the gradients of hidden, and of weight and bias where tokens are kept (elsewhere they are zeros
    before).

    `saved` are entropy, logits and stats of the forward, and the gradients of log-prob and entropy.
    """
    hidden, weight, _, *support = inputs
    _, ids, offsets, _ = support
    grad_hidden, grad_weight, grad_bias = grads
    N, H = hidden.shape
    if N == 0:
        return
    blocks = triton.cdiv(H, LAUNCH["HIDDEN"])
    grad = torch.empty_like(saved[1])  # of the support's logits
    tensors = (weight, *support, softcap or 1.0, *saved, grad, grad_hidden)
    launch(sparse_backward, (N, blocks), *tensors, H, HAS_CAP=softcap > 0, **LAUNCH)
    if grad_weight is not None:
        ranked, order = ids.long().sort(stable=True)
        starts = torch.searchsorted(ranked, torch.arange(len(weight) + 1, device=ids.device))
        every_row = torch.arange(N, device=ids.device)
        rows = torch.repeat_interleave(every_row, offsets.diff(), output_size=len(ids))
        entries = (hidden, order, rows, starts, grad)
        out = (grad_weight, grad if grad_bias is None else grad_bias)
        grid, flags = (len(weight), blocks), {"HAS_BIAS": grad_bias is not None}
        launch(sparse_weight, grid, *entries, *out, H, **flags, **LAUNCH)
