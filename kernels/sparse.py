"""Log-probs over supports, and sampling, both from hidden states: the contracts, the calls of C++ and Triton,
and the `torch.library` ops with gradients.

Shapes: N rows, H hidden, V vocabulary, E ids of the supports of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import linear, reference, softmax
from duologue.kernels.backend import DTYPES, check, check_softcap, lib, pointers, triton
from torch import Tensor


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless these are [N, H], [V, H] and [V] of one dtype on one device, and softcap is
    positive or None."""
    device = hidden.device.type
    check(op, "hidden", hidden, (None, None), None, device)
    check(op, "weight", weight, (None, hidden.shape[1]), hidden.dtype, device)
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has an empty vocabulary")
    if bias is not None:
        check(op, "bias", bias, (len(weight),), hidden.dtype, device)
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
    """(log-prob [N], entropy [N]); on Triton unwritten for rows without a support."""
    op = "sparse_linear_logprob"
    N, device = len(hidden), hidden.device.type
    temperature = per_row(temperature, hidden)
    check(op, "targets", targets, (N,), torch.int64, device)
    check(op, "kept_ids", kept_ids, (None,), torch.int32, device)
    check(op, "kept_offsets", kept_offsets, (N + 1,), torch.int64, device)
    check(op, "temperature", temperature, (N,), torch.float32, device)
    support = (targets, kept_ids, kept_offsets, temperature)
    out: tuple[Tensor, ...] = logprob_op(hidden, weight, bias, *support, softcap or 0.0)
    return out[0], out[1]


def _sizes(hidden: Tensor, weight: Tensor, kept_ids: Tensor) -> tuple[int, ...]:
    return *hidden.shape, len(weight), len(kept_ids), DTYPES[hidden.dtype]


@torch.library.custom_op("duologue::sparse_linear_logprob", mutates_args=())
def logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], logits [E] and stats [N, 2] for the backward); temperature [N]."""
    inputs = _contiguous(hidden, weight, bias, targets, kept_ids, kept_offsets, temperature)
    if triton(hidden):
        from duologue.kernels.gpu import sparse as gpu_sparse

        return gpu_sparse.forward(inputs, softcap)
    N = len(hidden)
    out = torch.empty(N), torch.empty(N), torch.empty(len(kept_ids)), torch.empty(N, 2)
    bad = lib().sparse_logprob(*pointers(*inputs, *out), *_sizes(hidden, weight, kept_ids), softcap)
    if bad:
        raise ValueError(f"sparse_linear_logprob: {bad}")
    return out


@logprob_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    N = hidden.shape[0]
    shapes = ((N,), (N,), kept_ids.shape, (N, 2))
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("duologue::sparse_linear_logprob_backward", mutates_args=())
def backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: Tensor,
    softcap: float,
    saved: list[Tensor],
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, the last two empty unless needed.

    `saved` are entropy, logits and stats of the forward, and the gradients of log-prob and entropy.
    """
    inputs = _contiguous(hidden, weight, bias, targets, kept_ids, kept_offsets, temperature)
    saved = list(_contiguous(*saved))
    grad_hidden = torch.empty_like(inputs[0])
    grad_weight = torch.zeros_like(inputs[1]) if need_weight else None
    grad_bias = torch.zeros_like(inputs[2]) if need_weight and bias is not None else None
    grads = (grad_hidden, grad_weight, grad_bias)
    if triton(hidden):
        from duologue.kernels.gpu import sparse as gpu_sparse

        gpu_sparse.backward(inputs, softcap, saved, grads)
    else:
        tensors = pointers(*inputs, *saved, *grads)
        lib().sparse_backward(*tensors, *_sizes(hidden, weight, kept_ids), softcap)
    grad_weight = weight.new_empty(0) if grad_weight is None else grad_weight
    grad_bias = weight.new_empty(0) if grad_bias is None else grad_bias
    return grad_hidden, grad_weight, grad_bias


@backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    need_weight = rest[-1]
    wanted = (hidden, weight if need_weight else None, bias if need_weight else None)
    return tuple(hidden.new_empty(0 if x is None else x.shape) for x in wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.softcap = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors[:7]
    saved = [*ctx.saved_tensors[7:], *grads[:2]]
    needs = ctx.needs_input_grad
    of_inputs = backward_op(*inputs, ctx.softcap, saved, needs[1] or needs[2])
    return *(grad if need else None for grad, need in zip(of_inputs, needs, strict=False)), *[None] * 5


logprob_op.register_autograd(_backward, setup_context=_setup)


# ---- sampling ----------------------------------------------------------------------------------------------


def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: softmax.Settings, softcap: float
) -> softmax.Samples:
    """On C++. `settings` are those of `sample`."""
    op, (N, H) = "linear_sample", hidden.shape
    head = _contiguous(hidden, weight, bias)
    settings = softmax.check_settings(op, settings, N, "cpu")
    sizes = (H, len(weight), DTYPES[hidden.dtype], softcap)
    return softmax.call_sampler(op, lib().linear_sample, pointers(*head), settings, N, *sizes)


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
    settings = softmax.check_settings("linear_sample", settings, N, hidden.device.type)
    temperature, top_k, top_p, min_p, seed, position = settings
    no_supports = seed.new_empty(0, dtype=torch.int32), seed.new_zeros(N + 1)
    if exact:
        logits = linear.forward(hidden, weight, bias, torch.float32)
        logits = reference.softcapped(logits, softcap, out=logits)
        off = (torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p))
        drawn = softmax.sample_bounded(logits, (temperature, *off, seed, position), 1)[:3]
    else:
        drawn = gpu_sampler.linear_sample(hidden, weight, bias, temperature, seed, position, softcap)
    return *drawn, *no_supports
