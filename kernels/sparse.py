"""Log-probs over kept supports and sampling from hidden states: the contracts, and the `torch.library` ops with gradients.

Shapes: N rows, H hidden, V vocabulary, E kept entries of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import reference, softmax
from duologue.kernels.cpu import DTYPES, check, lib, pointers
from torch import Tensor


def _head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, H], [V, H] and [V] or None, contiguous; ValueError unless they are that, of one dtype on one device."""
    device = hidden.device.type
    check(op, "hidden", hidden, (None, None), None, device)
    check(op, "weight", weight, (None, hidden.shape[1]), hidden.dtype, device)
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has an empty vocabulary")
    if bias is not None:
        check(op, "bias", bias, (len(weight),), hidden.dtype, device)
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap = {softcap}, accepted is None or a finite number above 0")
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


@torch.library.custom_op("duologue::sparse_linear_logprob", mutates_args=())
def logprob_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor,
    temperature: Tensor, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log-prob [N], entropy [N], logits [E] and stats [N, 2] for the backward); temperature [N]."""
    op, N, device = "sparse_linear_logprob", len(hidden), hidden.device.type
    hidden, weight, bias = _head(op, hidden, weight, bias, softcap)
    check(op, "targets", targets, (N,), torch.int64, device)
    check(op, "kept_ids", kept_ids, (None,), torch.int32, device)
    check(op, "kept_offsets", kept_offsets, (N + 1,), torch.int64, device)
    check(op, "temperature", temperature, (N,), torch.float32, device)
    rest = [x.contiguous() for x in (targets, kept_ids, kept_offsets, temperature)]
    if hidden.is_cuda:
        from duologue.kernels import triton_sparse

        return triton_sparse.forward(hidden, weight, bias, *rest, softcap)
    out = torch.empty(N), torch.empty(N), torch.empty(len(kept_ids)), torch.empty(N, 2)
    sizes = (*hidden.shape, len(weight), len(kept_ids), DTYPES[hidden.dtype])
    if bad := lib().sparse_logprob(*pointers(hidden, weight, bias, *rest, *out), *sizes, softcap):
        raise ValueError(f"{op}: {bad}")
    return out


@logprob_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    n = hidden.shape[0]
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), kept_ids.shape, (n, 2)))


@torch.library.custom_op("duologue::sparse_linear_logprob_backward", mutates_args=())
def backward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor,
    temperature: Tensor, softcap: float, entropy: Tensor, logits: Tensor, stats: Tensor,
    grad_logprob: Tensor, grad_entropy: Tensor, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; the last two are empty unless needed."""
    inputs = [None if x is None else x.contiguous() for x in (hidden, weight, bias, targets, kept_ids, kept_offsets, temperature)]
    saved = [x.contiguous() for x in (entropy, logits, stats, grad_logprob, grad_entropy)]
    grad_hidden, none = torch.empty_like(inputs[0]), weight.new_empty(0)
    grad_weight = torch.zeros_like(inputs[1]) if need_weight else None
    grad_bias = torch.zeros_like(bias) if need_weight and bias is not None else None
    grads = grad_hidden, grad_weight, grad_bias
    if hidden.is_cuda:
        from duologue.kernels import triton_sparse

        triton_sparse.backward(*inputs, softcap, *saved, *grads)
    else:
        sizes = (*hidden.shape, len(weight), len(kept_ids), DTYPES[hidden.dtype])
        lib().sparse_backward(*pointers(*inputs, *saved, *grads), *sizes, softcap)
    return grad_hidden, none if grad_weight is None else grad_weight, none.clone() if grad_bias is None else grad_bias


@backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wanted = (hidden, weight if rest[-1] else None, bias if rest[-1] else None)
    return tuple(weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.softcap = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, saved, needs = ctx.saved_tensors[:7], ctx.saved_tensors[7:], ctx.needs_input_grad
    grads = backward_op(*inputs, ctx.softcap, *saved, grad_logprob, grad_entropy, needs[1] or needs[2])
    return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), *[None] * 5


logprob_op.register_autograd(_backward, setup_context=_setup)


def linear_sample(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> softmax.Drawn:
    """The rest: the settings of `sample`, and softcap."""
    op, softcap = "linear_sample", rest[6]
    hidden, weight, bias = _head(op, hidden, weight, bias, softcap)
    settings = softmax.check_settings(op, rest[:6], len(hidden))
    sizes = (*hidden.shape, len(weight), DTYPES[hidden.dtype], softcap)
    return softmax.draw(op, lib().linear_sample, pointers(hidden, weight, bias), settings, *sizes)


@torch.library.custom_op("duologue::linear_sample", mutates_args=())
def sample_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seed: Tensor, position: Tensor, softcap: float,
) -> softmax.Drawn:  # fmt: skip
    return linear_sample(hidden, weight, bias, temperature, top_k, top_p, min_p, seed, position, softcap)


sample_op.register_fake(softmax.fake_drawn)
