"""Cases of attention and sampling, in the form of cases.py, with what torch offers for the same work beside
each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import ops
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import LARGE, ODD, Case

TRAIN = "packed_attention forward and backward"


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _packed(op: str, S: int, L: int, Hq: int, Hk: int, D: int, kind: str) -> Case:
    """S sequences of L tokens; causal, so half of the L x L scores count. The backward has five products to
    the forward's two."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(L)
        q, k, v = (torch.randn(S * L, heads, D, generator=generator).to(dtype) for heads in (Hq, Hk, Hk))
        return q, k, v, _offsets([L] * S), D**-0.5

    flops = 2.0 * S * L * (L + 1) * Hq * D * (3.5 if op == TRAIN else 1)
    return Case(op, f"S={S} L={L} heads={Hq}/{Hk} D={D}", kind, make, flops, S * L * 2 * (Hq + Hk) * D)


def _decode(S: int, L: int, Hq: int, Hk: int, D: int, kind: str, page: int = 16) -> Case:
    """One query each for S sequences of L tokens, pages in random order: bound by reading the keys and values
    once."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(L)
        count = -(-L // page)
        pages = torch.randn(2, S * count, page, Hk, D, generator=generator).to(dtype)
        table = torch.randperm(S * count, generator=generator).view(S, count).int()
        q = torch.randn(S, Hq, D, generator=generator).to(dtype)
        return (
            q,
            pages[0],
            pages[1],
            table,
            _offsets([1] * S),
            torch.full((S,), L, dtype=torch.int32),
            D**-0.5,
        )

    return Case(
        "paged_attention",
        f"S={S} L={L} heads={Hq}/{Hk} D={D}",
        kind,
        make,
        4.0 * S * L * Hq * D,
        2 * S * L * Hk * D,
    )


def _sample(N: int, V: int, kind: str, top_k: int = 0, top_p: float = 1.0) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        logits = (3 * torch.randn(N, V, generator=torch.Generator().manual_seed(V))).to(dtype)
        ones, ids = torch.ones(N), torch.arange(N)
        return logits, ones, torch.full((N,), top_k, dtype=torch.int32), top_p * ones, 0 * ones, ids, ids

    return Case("sample", f"N={N} V={V} top_k={top_k} top_p={top_p}", kind, make, elements=N * V)


CASES: dict[str, list[Case]] = {
    "packed_attention": [
        *(_packed("packed_attention", 3, L, 4, 2, 20, ODD) for L in (1, 7, 127, 129)),
        _packed("packed_attention", 64, 128, 4, 2, 64, LARGE),
        _packed("packed_attention", 8, 300, 8, 4, 64, LARGE),
    ],
    TRAIN: [
        _packed(TRAIN, 64, 128, 4, 2, 64, LARGE),
        _packed(TRAIN, 64, 200, 4, 2, 32, LARGE),
        _packed(TRAIN, 128, 100, 4, 4, 16, LARGE),
        _packed(TRAIN, 8, 300, 8, 4, 64, LARGE),
        _packed(TRAIN, 2, 1024, 8, 2, 128, LARGE),
    ],
    "paged_attention": [
        *(_decode(3, L, 4, 2, 20, ODD) for L in (1, 7, 127, 129)),
        _decode(64, 100, 4, 2, 64, LARGE),
        _decode(16, 2048, 8, 8, 64, LARGE),
        _decode(16, 2048, 8, 2, 128, LARGE),
    ],
    "sample": [
        _sample(7, 129, ODD),
        _sample(64, 512, LARGE),
        _sample(64, 4096, LARGE),
        _sample(64, 4096, LARGE, 50),
        _sample(64, 4096, LARGE, 0, 0.95),
        _sample(16, 151_936, LARGE),
    ],
}


def _trained(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*inputs, *rest).sum(), inputs)


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """torch's own on [S, heads, L, D]; these cases need no padding."""
    q, k, v = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _gathered(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, _: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """What a torch engine does: gather each sequence's pages, then torch's own on the batch."""
    length = int(lengths[0])
    k, v = (pages[table.long()].flatten(1, 2)[:, :length].transpose(1, 2) for pages in (k_pages, v_pages))
    return scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)


def _multinomial(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float() / temperature.unsqueeze(1), -1)
    kept = logp
    if k := int(top_k[0]):
        kept = kept.masked_fill(kept < kept.topk(k).values[:, -1:], float("-inf"))
    if float(top_p[0]) < 1:
        ranked, order = kept.softmax(-1).sort(descending=True)
        gone = ranked.cumsum(-1) - ranked >= top_p.unsqueeze(1)
        kept = kept.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), float("-inf"))
    token = torch.multinomial(kept.softmax(-1), 1)
    return token, logp.gather(1, token)


OURS: dict[str, Callable[..., Any]] = {
    "packed_attention": ops.packed_attention,
    TRAIN: lambda *args: _trained(ops.packed_attention, *args),
    "paged_attention": ops.paged_attention,
    "sample": ops.sample,
}
PLAIN: dict[str, Callable[..., Any]] = {
    "packed_attention": _padded,
    TRAIN: lambda *args: _trained(_padded, *args),
    "paged_attention": _gathered,
    "sample": _multinomial,
}
