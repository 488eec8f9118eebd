"""Log-probs over kept supports and sampling from hidden states: the contracts, and the `torch.library` ops with gradients.

Shapes: N rows, H hidden, V vocabulary, E kept entries of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import softmax
from duologue.kernels.backend import DTYPES, check, family, lib, linear, pointers
from torch import Tensor


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless these are [N, H], [V, H] and [V] of one dtype on one device, and softcap is positive or None."""
    device = hidden.device.type
    check(op, "hidden", hidden, (None, None), None, device)
    check(op, "weight", weight, (None, hidden.shape[1]), hidden.dtype, device)
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has an empty vocabulary")
    if bias is not None:
        check(op, "bias", bias, (len(weight),), hidden.dtype, device)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap = {softcap}, accepted is None or a finite number above 0")


def check_support(
    op: str, hidden: Tensor, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor, temperature: Tensor
) -> None:
    N, device = len(hidden), hidden.device.type
    check(op, "targets", targets, (N,), torch.int64, device)
    check(op, "kept_ids", kept_ids, (None,), torch.int32, device)
    check(op, "kept_offsets", kept_offsets, (N + 1,), torch.int64, device)
    check(op, "temperature", temperature, (N,), torch.float32, device)


def _contiguous(*tensors: Tensor | None) -> Any:
    return tuple(None if x is None else x.contiguous() for x in tensors)


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
    N, inputs = len(hidden), _contiguous(hidden, weight, bias, targets, kept_ids, kept_offsets, temperature)
    if hidden.is_cuda:
        from duologue.kernels.gpu import sparse as gpu_sparse

        return gpu_sparse.forward(inputs, softcap)
    out = torch.empty(N), torch.empty(N), torch.empty(len(kept_ids)), torch.empty(N, 2)
    if bad := lib().sparse_logprob(*pointers(*inputs, *out), *_sizes(hidden, weight, kept_ids), softcap):
        raise ValueError(f"sparse_linear_logprob: {bad}")
    return out


def _sizes(hidden: Tensor, weight: Tensor, kept_ids: Tensor) -> tuple[int, ...]:
    return *hidden.shape, len(weight), len(kept_ids), DTYPES[hidden.dtype]


@logprob_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    n = hidden.shape[0]
    return tuple(
        hidden.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), kept_ids.shape, (n, 2))
    )


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
    """Gradients of hidden, weight and bias, the last two empty unless needed. `saved` as in gpu_sparse.backward."""
    inputs, saved = (
        _contiguous(hidden, weight, bias, targets, kept_ids, kept_offsets, temperature),
        list(_contiguous(*saved)),
    )
    grad_hidden = torch.empty_like(inputs[0])
    grad_weight, grad_bias = (
        torch.zeros_like(x) if need_weight and x is not None else None for x in inputs[1:3]
    )
    if hidden.is_cuda:
        from duologue.kernels.gpu import sparse as gpu_sparse

        gpu_sparse.backward(inputs, softcap, saved, (grad_hidden, grad_weight, grad_bias))
    else:
        outputs = pointers(grad_hidden, grad_weight, grad_bias)
        lib().sparse_backward(
            *pointers(*inputs, *saved), *outputs, *_sizes(hidden, weight, kept_ids), softcap
        )
    gone = [weight.new_empty(0) if x is None else x for x in (grad_weight, grad_bias)]
    return grad_hidden, gone[0], gone[1]


@backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wanted = (hidden, weight if rest[-1] else None, bias if rest[-1] else None)
    return tuple(hidden.new_empty(0 if x is None else x.shape) for x in wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.softcap = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs, saved, needs = ctx.saved_tensors[:7], [*ctx.saved_tensors[7:], *grads[:2]], ctx.needs_input_grad
    found = backward_op(*inputs, ctx.softcap, saved, needs[1] or needs[2])
    return *(grad if need else None for grad, need in zip(found, needs, strict=False)), *[None] * 5


logprob_op.register_autograd(_backward, setup_context=_setup)


def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: softmax.Settings, softcap: float
) -> softmax.Drawn:
    """`settings` are those of `sample`."""
    head, settings = (
        _contiguous(hidden, weight, bias),
        softmax.check_settings("linear_sample", settings, len(hidden), "cpu"),
    )
    sizes = (*hidden.shape, len(weight), DTYPES[hidden.dtype], softcap)
    return softmax.draw("linear_sample", lib().linear_sample, pointers(*head), settings, *sizes)


def linear_sample_whole(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: softmax.Settings,
    softcap: float,
    exact: bool,
) -> softmax.Drawn:
    """On Triton, no row truncated: launches alone, nothing that waits. Logits are stored if `exact`."""
    hidden, weight, bias = _contiguous(hidden, weight, bias)
    heat, top_k, top_p, min_p, seed, position = softmax.check_settings(
        "linear_sample", settings, len(hidden), hidden.device.type
    )
    none = seed.new_empty(0, dtype=torch.int32), seed.new_zeros(len(hidden) + 1)
    if exact:
        logits = linear(hidden, weight, bias, torch.float32)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        off = (heat, torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p), seed, position)
        return *softmax.sample_bounded(logits, off, 1)[:3], *none
    found: tuple[Tensor, Tensor, Tensor] = family("sampler").linear_sample(
        hidden, weight, bias, heat, seed, position, softcap
    )
    return *found, *none
