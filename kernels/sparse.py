"""Log-probs over supports, and sampling, both from hidden states: the contracts, the calls of C++ and Triton,
and the `torch.library` ops with gradients.

Shapes: N rows, H hidden, V vocabulary, E ids of the supports of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from duologue.kernels import head as fused_head
from duologue.kernels import linear, reference, softmax
from duologue.kernels.backend import (
    DTYPES,
    check,
    check_softcap,
    lib,
    library_op,
    pointers,
    triton,
    with_gradients,
)
from torch import Tensor


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless these are [N, H], [V, H] and [V] of one dtype on one device, and softcap is
    positive or None."""
    device = hidden.device.type
    check(op, device, hidden=(hidden, (None, None), None))
    check(op, device, weight=(weight, (None, hidden.shape[1]), hidden.dtype))
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has an empty vocabulary")
    check(op, device, bias=(bias, (len(weight),), hidden.dtype))
    check_softcap(op, softcap)


def _contiguous(*tensors: Tensor | None) -> Any:
    return tuple(None if x is None else x.contiguous() for x in tensors)


# ---- log-probs over supports -------------------------------------------------------------------------------


def per_row(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """[N] fp32."""
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((len(hidden),), float(temperature), device=hidden.device)


def logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-prob [N], entropy [N]). On Triton rows without a support take the head in chunks."""
    op = "sparse_linear_logprob"
    N = len(hidden)
    temperature = per_row(temperature, hidden)
    check(
        op,
        hidden.device.type,
        targets=(targets, (N,), torch.int64),
        kept_ids=(kept_ids, (None,), torch.int32),
        kept_offsets=(kept_offsets, (N + 1,), torch.int64),
        temperature=(temperature, (N,), torch.float32),
    )
    support = (targets, kept_ids, kept_offsets, temperature)
    out: tuple[Tensor, ...] = _logprob_grad(hidden, weight, bias, *support, softcap or 0.0)
    whole = (kept_offsets.diff() == 0).nonzero()[:, 0] if triton(hidden) else targets[:0]
    if len(whole) == 0:
        return out[0], out[1]
    of_whole = (hidden.index_select(0, whole), weight, targets[whole], temperature[whole])
    inputs = fused_head.prepare(op, *of_whole, bias, softcap, None, exact=True, chunk_bytes=None)
    full: tuple[Tensor, ...] = fused_head.linear_logprob_grad(*inputs)
    return out[0].index_put((whole,), full[0]), out[1].index_put((whole,), full[1])


def _sizes(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    hidden, weight, kept_ids = inputs[0], inputs[1], inputs[4]
    return *hidden.shape, len(weight), len(kept_ids), DTYPES[hidden.dtype]


_ARGS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor kept_ids, Tensor kept_offsets, "
    "Tensor temperature, float softcap"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], logits [E] and stats [N, 2] for the backward); temperature [N]."""
    *tensors, softcap = args
    inputs = _contiguous(*tensors)
    if triton(inputs[0]):
        from duologue.kernels.gpu import sparse as gpu_sparse

        return gpu_sparse.forward(inputs, softcap)
    N, E = len(inputs[0]), len(inputs[4])
    out = torch.empty(N), torch.empty(N), torch.empty(E), torch.empty(N, 2)
    bad = lib().sparse_logprob(*pointers(*inputs, *out), *_sizes(inputs), softcap)
    if bad:
        raise ValueError(f"sparse_linear_logprob: {bad}")
    return out


logprob_op = library_op(
    "sparse_linear_logprob", _forward, schema=f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@logprob_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    N = hidden.shape[0]
    shapes = ((N,), (N,), kept_ids.shape, (N, 2))
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _gradients(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias, the last two empty unless needed.

    `saved` are entropy, logits and stats of the forward, and the gradients of log-prob and entropy.
    """
    *tensors, softcap, saved, need_weight = args
    inputs = _contiguous(*tensors)
    saved = list(_contiguous(*saved))
    hidden, weight, bias = inputs[:3]
    grad_weight = torch.zeros_like(weight) if need_weight else None
    grad_bias = torch.zeros_like(bias) if need_weight and bias is not None else None
    grads = (torch.empty_like(hidden), grad_weight, grad_bias)
    if triton(hidden):
        from duologue.kernels.gpu import sparse as gpu_sparse

        gpu_sparse.backward(inputs, softcap, saved, grads)
    else:
        addresses = pointers(*inputs, *saved, *grads)
        lib().sparse_backward(*addresses, *_sizes(inputs), softcap)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


backward_op = library_op(
    "sparse_linear_logprob_backward",
    _gradients,
    schema=f"({_ARGS}, Tensor[] saved, bool need_weight) -> (Tensor, Tensor, Tensor)",
)


@backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    need_weight = rest[-1]
    wanted = (hidden, weight if need_weight else None, bias if need_weight else None)
    return tuple(hidden.new_empty(0 if x is None else x.shape) for x in wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.softcap = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(run: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors[:7]
    saved = [*ctx.saved_tensors[7:], *grads[:2]]
    needs = ctx.needs_input_grad
    of_inputs = run(*inputs, ctx.softcap, saved, needs[1] or needs[2])
    return *(grad if need else None for grad, need in zip(of_inputs, needs, strict=False)), *[None] * 5


_logprob_grad = with_gradients(logprob_op, _forward, _setup, _backward, backward_op, _gradients)


# ---- sampling ----------------------------------------------------------------------------------------------


def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: softmax.Settings, softcap: float
) -> softmax.Samples:
    """On C++. `settings` are those of `sample`."""
    op, (N, H) = "linear_sample", hidden.shape
    head = _contiguous(hidden, weight, bias)
    checked = softmax.check_settings(op, settings, N, "cpu")
    sizes = (H, len(weight), DTYPES[hidden.dtype], softcap)
    return softmax.call_sampler(op, lib().linear_sample, pointers(*head), checked, N, *sizes)


def linear_sample_whole(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: softmax.Settings,
    softcap: float,
    exact: bool,
) -> softmax.Samples:
    """On Triton, no row truncated: launches alone, nothing that waits. Logits are stored if `exact`."""
    from duologue.kernels.gpu import sampler as gpu_sampler

    N = len(hidden)
    hidden, weight, bias = _contiguous(hidden, weight, bias)
    checked = softmax.check_settings("linear_sample", settings, N, hidden.device.type)
    temperature, top_k, top_p, min_p, seed, position = checked
    no_supports = seed.new_empty(0, dtype=torch.int32), seed.new_zeros(N + 1)
    if exact:
        logits = linear.forward(hidden, weight, bias, torch.float32)
        logits = reference.softcapped(logits, softcap, out=logits)
        off = (torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p))
        drawn = softmax.sample_bounded(logits, (temperature, *off, seed, position), 1)[:3]
    else:
        drawn = gpu_sampler.linear_sample(hidden, weight, bias, temperature, seed, position, softcap)
    return *drawn, *no_supports
