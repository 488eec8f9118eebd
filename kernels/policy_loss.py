"""The loss of a policy from its hidden states, in three matrix products: `ops.linear_policy_loss`.

The loss is called on each chunk of rows while their logits are there, and the logits are turned into their
gradient in place: so the gradients are known before anybody asks for them, and the first backward hands them
over.

Shapes: N rows, n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from duologue.kernels.head import (
    Head,
    Inputs,
    Rows,
    accumulate,
    check_values,
    linear_logprob_op,
    masked_rows,
    score,
)
from duologue.kernels.linear import gradient_place
from torch import Tensor

LossFn = Callable[[Tensor, Tensor, Rows], Any]


class PolicyLoss(NamedTuple):
    loss: Tensor  # differentiable in hidden, weight and bias
    logprob: Tensor  # [N], without gradient; 0 where the mask is False
    entropy: Tensor  # [N], likewise
    sums: dict[str, Tensor]  # what loss_fn gave beside the loss, summed over its calls; {} without a row


def _loss_and_sums(
    loss_fn: LossFn, logprob: Tensor, entropy: Tensor, rows: Rows, sums: dict[str, Tensor]
) -> Tensor:
    """The loss; what loss_fn gives beside it is added to `sums`."""
    returned = loss_fn(logprob, entropy, rows)
    loss: Tensor
    loss, values = returned if isinstance(returned, tuple) else (returned, {})
    if loss.dim():
        shape = tuple(loss.shape)
        raise ValueError(f"linear_policy_loss: loss_fn returned shape {shape}, accepted is a scalar")
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach()
    return loss


def _coefficients(
    loss_fn: LossFn, logprob: Tensor, entropy: Tensor, rows: Rows, sums: dict[str, Tensor], need: bool
) -> list[Tensor]:
    """[loss, its derivative by each log-prob, by each entropy]."""
    with torch.set_grad_enabled(need):
        inputs = [x.detach().requires_grad_(need) for x in (logprob, entropy)]
        loss = _loss_and_sums(loss_fn, inputs[0], inputs[1], rows, sums)
        if not loss.requires_grad:
            return [loss.detach(), *(torch.zeros_like(x) for x in inputs)]
        return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, loss_fn, by_sequence, sums = rest
        need = ctx.needs_input_grad[:3]
        head = Head(inputs, need)
        index = masked_rows(inputs.mask)
        n = head.N if index is None else len(index)
        logprob, entropy = head.new(head.N).zero_(), head.new(head.N).zero_()
        loss = head.new().zero_()
        if by_sequence and n > head.step:
            logprob, entropy, stats = score(head, index)
            rows: Rows = slice(0, n) if index is None else index
            loss, *grads = _coefficients(loss_fn, logprob[rows], entropy[rows], rows, sums, any(need))
            g, h = torch.zeros_like(logprob), torch.zeros_like(logprob)
            g[rows], h[rows] = grads
            if any(need):
                accumulate(head, stats, entropy, g, h)
        else:
            for rows in head.chunks(index):
                logits = head.project(rows)
                logprob[rows], entropy[rows], stats = head.stats(logits, rows)
                part, *grads = _coefficients(loss_fn, logprob[rows], entropy[rows], rows, sums, any(need))
                loss = loss + part
                if any(need):
                    head.gradient(logits, rows, stats, entropy[rows], *grads)
        ctx.grads = head.sums()
        ctx.parameter = weight if need[1] and weight.is_leaf else None
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            said = "the first backward handed the gradients over, a second has none"
            raise RuntimeError(f"linear_policy_loss: {said}")
        grads, ctx.grads = ctx.grads, None
        by_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
        if place := gradient_place(ctx.parameter):  # in fp32, and nothing of it to autograd
            of_weight, grads[1] = grads[1], None
            total, add = place()
            of_weight = of_weight if by_one else of_weight.mul_(grad_loss)
            total.add_(of_weight) if add else total.copy_(of_weight)
        if not by_one:  # while the sums are wide: in fp16 what a loss scale would keep is 0 otherwise
            grads = [None if x is None else x.mul_(grad_loss) for x in grads]
        grads = [None if x is None else x.to(ctx.dtype) for x in grads]
        return *grads, None, None, None, None


def policy_loss(inputs: Inputs, loss_fn: LossFn, level: str) -> PolicyLoss:
    """`ops.linear_policy_loss` of arguments that were checked."""
    if level not in ("token", "sequence"):
        raise ValueError(f"linear_policy_loss: level = {level!r}, accepted is 'token' or 'sequence'")
    sums: dict[str, Tensor] = {}
    by_chunks: Callable[..., PolicyLoss] = _chunked_policy_loss
    if torch.compiler.is_compiling() and inputs.mask is not None:
        # Out of the graph. At its definition this would import the compiler at each start.
        by_chunks = torch.compiler.disable(by_chunks)  # type: ignore[no-untyped-call]
    elif torch.compiler.is_compiling():  # loss_fn is traced too, in one call
        logprob, entropy, _ = linear_logprob_op(*inputs)
        loss = _loss_and_sums(loss_fn, logprob, entropy, slice(0, len(logprob)), sums)
        return PolicyLoss(loss, logprob.detach(), entropy.detach(), sums)
    return by_chunks(inputs, loss_fn, level == "sequence", sums)


def _chunked_policy_loss(
    inputs: Inputs, loss_fn: LossFn, by_sequence: bool, sums: dict[str, Tensor]
) -> PolicyLoss:
    check_values("linear_policy_loss", inputs)
    head = (inputs.hidden, inputs.weight, inputs.bias)
    if not torch.is_grad_enabled():  # which a Function is not told
        head = tuple(None if x is None else x.detach() for x in head)  # type: ignore[assignment]
    out = _PolicyLoss.apply(*head, inputs, loss_fn, by_sequence, sums)  # type: ignore[no-untyped-call]
    return PolicyLoss(out[0], out[1], out[2], sums)
