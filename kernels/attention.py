"""Causal attention, packed and over pages: the contracts, the calls of C++ and Triton, and the
`torch.library` ops, the packed one with gradients.

Shapes: T tokens, Hq/Hk query and key heads, D head dim, S sequences, P pages, B page size.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import libraries
from duologue.kernels.backend import (
    DTYPES,
    check,
    device_type,
    lib,
    library_op,
    pointers,
    triton,
    with_gradients,
)
from torch import Tensor

Groups = tuple[Tensor, Tensor]  # starts [G + 1] int32, shared [G] int32: see ops.paged_attention
# Items [most, 3] int32 (sequence, sequences, chunk of keys), of which the first n [1] int32 are to be done.
Work = tuple[Tensor, Tensor]


def decode_work(
    q_heads: int,
    k_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    groups: Groups | None = None,
) -> Work | None:
    """The work list of `ops.paged_attention` with one query for each sequence, of `q_heads` heads; all else
    as there. Made on the device, without a wait. None where Triton does not serve.
    """
    if not triton(k_pages) or torch.compiler.is_compiling():
        return None
    from duologue.kernels.gpu import attention_decode

    _, page_size, Hk, _ = k_pages.shape
    most_keys = block_table.shape[1] * page_size
    narrow = k_pages.element_size() == 2
    return attention_decode.work_of(context_lens, most_keys, q_heads // Hk, groups, narrow)


def _check_heads(op: str, q: Tensor, Hk: int) -> None:
    _, Hq, D = q.shape
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"{op}: {Hq} query heads are no multiple of {Hk} key heads")
    limit = 256 if D > 256 and triton(q) else 1024
    if not 0 < D <= limit:
        raise ValueError(f"{op}: the head dim is {D}, accepted is 1 to {limit}")


def _check_lengths(op: str, bad: int, T: int) -> None:
    if bad < 0:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to T = {T}, its entry {-bad - 1} does not")


def packed_with_stats(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, longest: int = 0
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], each row's largest score, in base 2, and 1 / sum [T, Hq, 2] fp32 for the backward).

    `longest`, the longest sequence, lets a library take the backward where one serves; 0: it stays here.
    """
    op = "packed_attention"
    q, k, v, cu_seqlens = map(Tensor.contiguous, (q, k, v, cu_seqlens))
    device = device_type(q)
    if q.dim() != 3:
        check(op, device, q=(q, (None, None, None), None))
    T, Hq, D = q.shape
    of_keys, dtype = k.shape, q.dtype
    Hk = of_keys[1] if len(of_keys) == 3 else None
    check(
        op,
        device,
        k=(k, (T, Hk, D), dtype),
        v=(v, of_keys, dtype),
        cu_seqlens=(cu_seqlens, cu_seqlens.shape if cu_seqlens.dim() == 1 else (None,), torch.int32),
    )
    assert Hk is not None
    _check_heads(op, q, Hk)
    S = cu_seqlens.shape[0] - 1
    if S < 0:
        raise ValueError(f"{op}: cu_seqlens is empty, accepted is [S + 1] from 0 to T")
    out = torch.empty_like(q)
    stats = q.new_empty(T, Hq, 2, dtype=torch.float32)
    if triton(q):
        from duologue.kernels.gpu import attention as gpu_attention

        return gpu_attention.forward(q, k, v, out, stats, cu_seqlens, scale), stats
    tensors = pointers(q, k, v, out, stats, cu_seqlens)
    bad = lib().packed_attention(*tensors, T, S, Hq, Hk, D, scale, DTYPES[q.dtype])
    _check_lengths(op, bad, T)
    return out, stats


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return packed_with_stats(q, k, v, cu_seqlens, scale)[0]


def packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    out: Tensor,
    stats: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    q, k, v, grad, cu_seqlens = map(Tensor.contiguous, (q, k, v, grad, cu_seqlens))
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if triton(q):
        from duologue.kernels.gpu import attention_backward as gpu_backward

        gpu_backward.backward(q, k, v, cu_seqlens, scale, out, stats, grad, *grads)
        return grads
    _, Hq, D = q.shape
    sizes = cu_seqlens.shape[0] - 1, Hq, k.shape[1], D
    tensors = pointers(q, k, v, out, stats, grad, *grads, cu_seqlens)
    lib().attention_backward(*tensors, *sizes, scale, DTYPES[q.dtype])
    return grads


def paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    groups: Groups | None = None,
    work: Work | None = None,
) -> Tensor:
    op = "paged_attention"
    q, block_table, cu_seqlens, context_lens = (
        x.contiguous() for x in (q, block_table, cu_seqlens, context_lens)
    )
    device = device_type(q)
    check(op, device, q=(q, (None, None, None), None), context_lens=(context_lens, (None,), torch.int32))
    T, Hq, D = q.shape
    S = len(context_lens)
    check(
        op,
        device,
        k_pages=(k_pages, (None, None, None, D), q.dtype),
        v_pages=(v_pages, k_pages.shape, q.dtype),
        block_table=(block_table, (S, None), torch.int32),
        cu_seqlens=(cu_seqlens, (S + 1,), torch.int32),
    )
    P, B, Hk, _ = k_pages.shape
    _check_heads(op, q, Hk)
    if B == 0 or B % 16:
        raise ValueError(f"{op}: the page size is {B}, accepted is a multiple of 16")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"{op}: k_pages and v_pages must be contiguous, copying them is expensive")
    out = torch.empty_like(q)
    if triton(q):
        from duologue.kernels.gpu import attention as gpu_attention
        from duologue.kernels.gpu import attention_decode

        if groups is None and work is None:
            lengths = (cu_seqlens, scale, block_table, context_lens)
            return gpu_attention.forward(q, k_pages, v_pages, out, None, *lengths)
        if T != S:
            given = "groups" if work is None else "work"
            raise ValueError(f"{op}: {T} queries of {S} sequences, accepted with {given} is one of each")
        if work is None:
            work = decode_work(Hq, k_pages, block_table, context_lens, groups)
        assert work is not None
        return attention_decode.decode(q, k_pages, v_pages, out, scale, block_table, context_lens, work)
    tensors = pointers(q, k_pages, v_pages, out, block_table, cu_seqlens, context_lens)
    sizes = T, S, Hq, Hk, D, B, block_table.shape[1], P
    bad = lib().paged_attention(*tensors, *sizes, scale, DTYPES[q.dtype])
    _check_lengths(op, bad, T)
    if bad:
        raise _bad_sequence(bad - 1, cu_seqlens, context_lens, block_table, k_pages)
    return out


def _bad_sequence(
    s: int, cu_seqlens: Tensor, context_lens: Tensor, block_table: Tensor, k_pages: Tensor
) -> ValueError:
    P, B = k_pages.shape[:2]
    queries = int(cu_seqlens[s + 1] - cu_seqlens[s])
    given = f"{queries} queries, context_lens {int(context_lens[s])}"
    pages = f"the pages {block_table[s].tolist()} of {B} tokens"
    accepted = f"at least as many tokens as queries, and a page from 0 to {P - 1} for each {B} of them"
    return ValueError(f"paged_attention: sequence {s} has {given} and {pages}; accepted are {accepted}")


# ---- torch.library ops -------------------------------------------------------------------------------------


packed_op = library_op("packed_attention", packed_with_stats)
packed_backward_op = library_op("packed_attention_backward", packed_backward, 0, 1, 2)


@packed_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((*q.shape[:2], 2), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, *more = inputs
    ctx.longest = more[0] if more else 0
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _backward(run: Any, ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, stats = ctx.saved_tensors
    no_more = [None] * (ctx.n_inputs - 3)
    library = libraries.attention_backward(q) if ctx.longest and run is packed_backward else None
    if library is None:
        return *run(q, k, v, cu_seqlens, ctx.scale, out, stats, grad), *no_more
    q, k, v, cu_seqlens, grad = map(Tensor.contiguous, (q, k, v, cu_seqlens, grad))
    sums = libraries.log_sum_exp(stats)
    return *library(q, k, v, cu_seqlens, ctx.scale, ctx.longest, out, sums, grad), *no_more


packed_grad = with_gradients(
    packed_op, packed_with_stats, _setup, _backward, packed_backward_op, packed_backward, first=True
)


paged_op = library_op(
    "paged_attention",
    paged,
    0,
    schema="(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor cu_seqlens, "
    "Tensor context_lens, float scale) -> Tensor",
)


def paged_traced(*inputs: Any) -> Any:
    """Without groups and work, which come last and change no bit."""
    return paged_op(*inputs[:7])
