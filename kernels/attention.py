"""Attention on the C++ kernels: the contracts, and `torch.library` ops, the packed one with gradients.

Shapes: T tokens, Hq/Hk query and key heads, D head dim, S sequences, P pages, B page size.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels.backend import DTYPES, check, family, lib, triton
from torch import Tensor


def _check_heads(op: str, q: Tensor, Hk: int) -> None:
    (_, Hq, D), most = q.shape, 256 if triton(q) else 1024
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"{op}: {Hq} query heads are no multiple of {Hk} key heads")
    if not 0 < D <= most:
        raise ValueError(f"{op}: the head dim is {D}, accepted is 1 to {most}")


def _check_lengths(op: str, bad: int, T: int) -> None:
    if bad < 0:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to T = {T}, its entry {-bad - 1} does not")


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], each row's largest score and 1 / sum [T, Hq, 2] fp32 for the backward)."""
    op = "packed_attention"
    q, k, v, cu_seqlens = q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens.contiguous()
    check(op, "q", q, (None, None, None), None, q.device.type)
    T, Hq, D = q.shape
    check(op, "k", k, (T, None, D), q.dtype, q.device.type)
    Hk = k.shape[1]
    check(op, "v", v, (T, Hk, D), q.dtype, q.device.type)
    check(op, "cu_seqlens", cu_seqlens, (None,), torch.int32, q.device.type)
    _check_heads(op, q, Hk)
    if len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens is empty, accepted is [S + 1] from 0 to T")
    out, stats = torch.empty_like(q), q.new_empty((T, Hq, 2), dtype=torch.float32)
    if triton(q):
        return family("attention").forward(q, k, v, out, stats, cu_seqlens, scale), stats
    bad = lib().packed_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        cu_seqlens.data_ptr(),
        T,
        len(cu_seqlens) - 1,
        Hq,
        Hk,
        D,
        scale,
        DTYPES[q.dtype],
    )
    _check_lengths(op, bad, T)
    return out, stats


def paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    op = "paged_attention"
    q, block_table = q.contiguous(), block_table.contiguous()
    cu_seqlens, context_lens = cu_seqlens.contiguous(), context_lens.contiguous()
    check(op, "q", q, (None, None, None), None, q.device.type)
    T, Hq, D = q.shape
    check(op, "k_pages", k_pages, (None, None, None, D), q.dtype, q.device.type)
    P, B, Hk, _ = k_pages.shape
    check(op, "v_pages", v_pages, (P, B, Hk, D), q.dtype, q.device.type)
    check(op, "context_lens", context_lens, (None,), torch.int32, q.device.type)
    S = len(context_lens)
    check(op, "block_table", block_table, (S, None), torch.int32, q.device.type)
    check(op, "cu_seqlens", cu_seqlens, (S + 1,), torch.int32, q.device.type)
    _check_heads(op, q, Hk)
    if B == 0 or B % 16:
        raise ValueError(f"{op}: the page size is {B}, accepted is a multiple of 16")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"{op}: k_pages and v_pages must be contiguous, copying them is dear")
    out = torch.empty_like(q)
    if triton(q):
        return family("attention").forward(
            q, k_pages, v_pages, out, None, cu_seqlens, scale, block_table, context_lens, groups
        )
    bad = lib().paged_attention(
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        cu_seqlens.data_ptr(),
        context_lens.data_ptr(),
        T,
        S,
        Hq,
        Hk,
        D,
        B,
        block_table.shape[1],
        P,
        scale,
        DTYPES[q.dtype],
    )
    _check_lengths(op, bad, T)
    if bad:
        s = bad - 1
        n, length, pages = (
            int(cu_seqlens[s + 1] - cu_seqlens[s]),
            int(context_lens[s]),
            block_table[s].tolist(),
        )
        raise ValueError(
            f"{op}: sequence {s} has {n} queries, context_lens {length} and the pages {pages} of {B} tokens; accepted "
            f"are at least as many tokens as queries, and a page from 0 to {P - 1} for each {B} of them"
        )
    return out


def library(q: Tensor) -> Callable[..., Tensor] | None:
    """Attention (q, k, v, cu_seqlens, scale, longest sequence) by flash-attn, or torch's own, where one takes q."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return None
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func as run

        return lambda q, k, v, cu, scale, most: run(
            q, k, v, cu, cu, most, most, softmax_scale=scale, causal=True
        )
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        return None
    from torch.nn.attention.varlen import varlen_attn

    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None
    causal: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True}
    own: Callable[..., Any] = varlen_attn
    return lambda q, k, v, cu, scale, most: own(q, k, v, cu, cu, most, most, scale=scale, **causal)


# ---- torch.library ops -----------------------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("duologue::packed_attention", mutates_args=())
def packed_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return packed(q, k, v, cu_seqlens, scale)


@packed_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty((*q.shape[:2], 2), dtype=torch.float32)


@torch.library.custom_op("duologue::packed_attention_backward", mutates_args=())
def packed_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    out: Tensor,
    stats: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad, cu_seqlens = (x.contiguous() for x in (q, k, v, grad, cu_seqlens))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if triton(q):
        return family("attention").backward(
            q, k, v, cu_seqlens, scale, out, stats, grad, grad_q, grad_k, grad_v
        )
    lib().attention_backward(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr(),
        grad_q.data_ptr(),
        grad_k.data_ptr(),
        grad_v.data_ptr(),
        cu_seqlens.data_ptr(),
        len(cu_seqlens) - 1,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        scale,
        DTYPES[q.dtype],
    )
    return grad_q, grad_k, grad_v


@packed_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    out: Tensor,
    stats: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, stats = ctx.saved_tensors
    return *packed_backward_op(q, k, v, cu_seqlens, ctx.scale, out, stats, grad), None, None


packed_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("duologue::paged_attention", mutates_args=())
def paged_op(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return paged(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale)


@paged_op.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return _like(q)
