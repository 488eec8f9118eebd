"""Several ops of a decode step in one launch, on Triton and where no gradient is wanted: the launches of a
layer are what a small model's step waits for. Bits are those of the single ops, which are their definition.

    norm - q, k, v - norms of heads, rotary embedding, KV write - attention - o - norm - gate, up, silu - down

Shapes: T tokens, K in, I intermediate, Hq/Hk query and key heads, D head dim, P pages, B page size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from duologue.kernels.backend import check, triton
from torch import Tensor

FEW = 512  # rows; with more a library multiplies faster, or larger tiles do


def serves(x: Tensor) -> bool:
    """Whether the ops of this file take `x`."""
    return triton(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _given(biases: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """Of linears that all have one, or none."""
    given = tuple(bias for bias in biases if bias is not None)
    assert len(given) in (0, len(biases)), "some of the linears have a bias and some have none"
    return given or None


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`ops.linear` of x [T, K] by each of three weights [O, K], biases [O]."""
    from duologue.kernels.gpu import linear as gpu_linear

    x = x.contiguous()
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        contracts = {f"weights[{i}]": (weight, (None, x.shape[1]), x.dtype)}
        check("linears", x.device.type, **contracts, bias=(bias, (len(weight),), x.dtype))
    a, b, c = (weight.contiguous() for weight in weights)
    outs = (x.new_empty(len(x), len(a)), x.new_empty(len(x), len(b)), x.new_empty(len(x), len(c)))
    given = _given(biases)
    added = None if given is None else (given[0], given[1], given[2])
    return gpu_linear.linears(x, (a, b, c), added, outs)


def add_scaled(x: Tensor, weight: Tensor, scale: float, out: Tensor) -> Tensor:
    """`out` [T, O] += scale * `ops.linear` of x [T, K] by weight [O, K], in place; contiguous, of 16 bits."""
    from duologue.kernels.gpu import linear as gpu_linear

    x, weight = x.contiguous(), weight.contiguous()
    of_weight = (weight, (None, x.shape[1]), x.dtype)
    check("add_scaled", x.device.type, weight=of_weight, out=(out, (len(x), len(weight)), x.dtype))
    assert out.is_contiguous(), "out is written in place"
    assert out.element_size() == 2, "in fp32 a product and a sum may become one instruction"
    return gpu_linear.add_scaled(x, weight, scale, out)


def gate_up(x: Tensor, gate: Tensor, up: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    """`ops.silu_mul` of `ops.linear` by gate and by up, both [I, K]: x [T, K] -> [T, I]."""
    from duologue.kernels.gpu import linear as gpu_linear

    x = x.contiguous()
    device = x.device.type
    check("gate_up", device, gate=(gate, (None, x.shape[1]), x.dtype), up=(up, gate.shape, x.dtype))
    given = _given(biases)
    added = None if given is None else (given[0], given[1])
    return gpu_linear.gate_up(x, gate.contiguous(), up.contiguous(), added, x.new_empty(len(x), len(gate)))


def rotate_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotary: tuple[Tensor, Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """`ops.rms_norm` of each head of q [T, Hq, D] and k [T, Hk, D] by its weight [D] (None: no norm),
    `ops.rope` by `rotary` (cos, sin [max_position, D / 2] fp32, positions [T] int64), and `ops.write_kv` of k
    and v to the slots [T] int64 of k_pages and v_pages [P, B, Hk, D]. Returns q.
    """
    from duologue.kernels.gpu import rows as gpu_rows

    op = "rotate_write"
    device = q.device.type
    q, k, v = (x.contiguous() for x in (q, k, v))
    T, _, D = q.shape
    Hk = k.shape[1]
    cos, sin, positions = (x.contiguous() for x in rotary)
    check(
        op,
        device,
        k=(k, (T, Hk, D), q.dtype),
        v=(v, k.shape, q.dtype),
        cos=(cos, (None, D // 2), torch.float32),
        sin=(sin, cos.shape, torch.float32),
        positions=(positions, (T,), torch.int64),
        k_pages=(pages[0], (None, None, Hk, D), q.dtype),
        v_pages=(pages[1], pages[0].shape, q.dtype),
        slots=(slots, (T,), torch.int64),
    )
    assert all(page.is_contiguous() for page in pages), "pages are written in place"
    out = torch.empty_like(q)
    return gpu_rows.rotate_write(q, k, v, norms, eps, (cos, sin, positions), pages, slots.contiguous(), out)
