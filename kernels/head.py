"""The fused head: log-probs, entropies and the policy gradient from hidden states, with no [N, V] tensor.

`linear_logprob` is an ordinary differentiable op; its backward computes the logits of a chunk again (four matrix products in
all). `linear_policy_loss` knows the loss, so it turns each chunk's logits into their gradient while it has them: three products.
It asks the caller's `loss_fn` for the loss of a chunk's [n] log-probs and entropies, differentiates that, and takes the results as
the coefficients c, e of the rows: with p = softmax(z), entropy S and log-prob l,

    dz_j = (c (1[j = target] - p_j) - e p_j (log p_j + S)) / temperature

The loss itself is defined by the caller and nowhere here. A chunk is as many rows as `chunk_bytes` of fp32 logits hold.

On CPU fp32 and bf16 run on the C++ kernels and a row's bits are those of `ops.linear` (fp32 out) and `ops.logprob`; elsewhere, and
for float64, PyTorch computes the same. Logits, log-probs, entropies and the sums of the weight gradient are fp32 (float64 for
float64 inputs).

Shapes: N rows, n rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from duologue.kernels import cpu, reference, softmax
from torch import Tensor

CHUNK_BYTES = 16 << 20
LIMIT = 2**31

LossFn = Callable[[Tensor, Tensor, slice], Tensor]


def check(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """Raise ValueError with the argument's name, its value and what is accepted."""

    def refuse(name: str, value: object, accepted: str) -> None:
        raise ValueError(f"{op}: {name} = {value}, accepted is {accepted}")

    if hidden.dim() != 2 or not hidden.is_floating_point():
        refuse("hidden", f"{hidden.dtype} of shape {tuple(hidden.shape)}", "floating point of shape (N, H)")
    N, H = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] == 0:
        refuse("weight", f"a tensor of shape {tuple(weight.shape)}", f"(V, {H}) with V > 0")
    V = weight.shape[0]
    if N >= LIMIT or V >= LIMIT:
        refuse("N, V", (N, V), f"fewer than {LIMIT} each")
    if targets.shape != (N,) or targets.dtype != torch.int64:
        refuse("targets", f"{targets.dtype} of shape {tuple(targets.shape)}", f"int64 of shape ({N},)")
    if bias is not None and bias.shape != (V,):
        refuse("bias", f"a tensor of shape {tuple(bias.shape)}", f"({V},)")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            refuse(name, x.dtype, f"hidden's {hidden.dtype}")
    rows = temperature if isinstance(temperature, Tensor) else None
    if rows is not None and rows.shape != (N,):
        refuse("temperature", f"a tensor of shape {tuple(rows.shape)}", f"a number, or ({N},)")
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias), ("temperature", rows)):
        if x is not None and x.device != hidden.device:
            refuse(f"{name}.device", x.device, f"hidden's {hidden.device}")
    if softcap is not None and not softcap > 0:
        refuse("softcap", softcap, "None or a number above 0")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU the value would cost a wait
        if N and not (int(targets.min()) >= 0 and int(targets.max()) < V):
            refuse("targets", f"{int(targets.min())} to {int(targets.max())}", f"0 to {V - 1}")
        least = temperature if rows is None else float(rows.min()) if N else 1.0
        if not least > 0:
            refuse("temperature", least, "above 0")


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    run = cpu.linear if cpu.serves(hidden) else reference.linear
    logits: Tensor = run(hidden, weight, bias, wide)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, what `_grad_logits` needs of the C++ kernel)."""
    if cpu.serves(logits):
        return softmax.logprob(logits, targets, *softmax.split_temperature(temperature), keep_stats=True)
    return *reference.logprob(logits, targets, temperature), logits.new_empty(0)


def _grad_logits(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, entropy: Tensor, stats: Tensor, c: Tensor, e: Tensor,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """dz in the place of z. With a soft cap z = s tanh(x / s), and dx = dz (1 - (z / s)^2)."""
    slope = None if softcap is None else 1 - (logits / softcap).square()
    if cpu.serves(logits):
        softmax.grad_logits_(logits, targets, *softmax.split_temperature(temperature), entropy, stats, c, e)
    else:
        inverse = 1 / temperature.unsqueeze(1) if isinstance(temperature, Tensor) else 1 / temperature
        logp = (logits * inverse).log_softmax(-1)
        logits.copy_(logp).add_(entropy.unsqueeze(1)).mul_(e.unsqueeze(1)).add_(c.unsqueeze(1)).mul_(logp.exp_()).neg_()
        logits.scatter_add_(1, targets.unsqueeze(1), c.unsqueeze(1)).mul_(inverse)
    return logits if slope is None else logits.mul_(slope)


class _Gradients:
    """The sums of dW and db over chunks, and dhidden row by row."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        self.bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if needs[2] and bias is not None else None
        self._w = weight.float().contiguous() if cpu.serves(weight) else weight

    def add(self, grad: Tensor, x: Tensor, rows: Tensor | slice) -> None:
        """Of logits' gradients [n, V], whose hidden states are x [n, H] and lie at `rows`."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        if cpu.serves(x):
            (n, V), H, x = grad.shape, x.shape[1], x.float().contiguous()
            if self.weight is not None:
                cpu.lib().matmul(grad.data_ptr(), x.data_ptr(), self.weight.data_ptr(), V, n, H, 1, V, True)
            if self.hidden is not None:
                out = torch.empty((n, H), dtype=torch.float32)
                cpu.lib().matmul(grad.data_ptr(), self._w.data_ptr(), out.data_ptr(), n, V, H, V, 1, False)
                self.hidden[rows] = out.to(self.hidden.dtype)
            return
        low = grad.to(x.dtype)
        if self.weight is not None:
            self.weight += low.t() @ x
        if self.hidden is not None:
            self.hidden[rows] = low @ self._w

    def cast(self, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(hidden.dtype)
        return self.hidden, weight, None if self.bias is None or bias is None else self.bias.to(bias.dtype)


def _chunks(n_rows: int, weight: Tensor, chunk_bytes: int) -> Iterator[slice]:
    size = max(1, chunk_bytes // (weight.shape[0] * (8 if weight.dtype == torch.float64 else 4)))
    return (slice(a, min(a + size, n_rows)) for a in range(0, n_rows, size))


def _of(temperature: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, bias: Tensor | None, softcap: float | None,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logprob, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
    for rows in _chunks(len(hidden), weight, chunk_bytes):
        logits = _logits(hidden[rows], weight, bias, softcap)
        logprob[rows], entropy[rows], _ = _logprob(logits, targets[rows], _of(temperature, rows))
    return logprob, entropy


def _add_chunk(
    sums: _Gradients, logits: Tensor, rows: slice, hidden: Tensor, targets: Tensor, temperature: float | Tensor,
    entropy: Tensor, stats: Tensor, c: Tensor, e: Tensor, softcap: float | None,
) -> None:  # fmt: skip
    """Add a chunk's gradients. Rows whose coefficients are zero leave before the products, except on a GPU, where that would wait."""
    if hidden.device.type == "cpu":
        kept = ((c != 0) | (e != 0)).nonzero().squeeze(1)
        if len(kept) == 0:
            return None
        if len(kept) < 0.9 * len(c):
            where = kept + rows.start
            temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
            logits, entropy, c, e = logits[kept], entropy[kept], c[kept], e[kept]
            stats = stats[kept] if len(stats) else stats
            grad = _grad_logits(logits, targets[where], _of(temperature, kept), entropy, stats, c, e, softcap)
            return sums.add(grad, hidden[where], where)
    grad = _grad_logits(logits, targets[rows], _of(temperature, rows), entropy, stats, c, e, softcap)
    return sums.add(grad, hidden[rows], rows)


# ---- linear_logprob as torch.library ops -------------------------------------------------------------------------------


@torch.library.custom_op("duologue::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, bias: Tensor | None,
    softcap: float | None, chunk_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _score(hidden, weight, targets, temperature if temperatures is None else temperatures, bias, softcap, chunk_bytes)


@_linear_logprob.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


@torch.library.custom_op("duologue::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, bias: Tensor | None,
    softcap: float | None, chunk_bytes: int, grad_logprob: Tensor, grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    each = temperature if temperatures is None else temperatures
    sums = _Gradients(hidden, weight, bias, (True, True, bias is not None))
    for rows in _chunks(len(hidden), weight, chunk_bytes):
        logits = _logits(hidden[rows], weight, bias, softcap)
        _, entropy, stats = _logprob(logits, targets[rows], _of(each, rows))
        c, e = grad_logprob[rows].contiguous(), grad_entropy[rows].contiguous()
        _add_chunk(sums, logits, rows, hidden, targets, each, entropy, stats, c, e, softcap)
    grad_hidden, grad_weight, grad_bias = sums.cast(hidden, bias)
    assert grad_hidden is not None
    assert grad_weight is not None
    return grad_hidden, grad_weight, hidden.new_empty(0) if grad_bias is None else grad_bias


@_linear_logprob_backward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Any, temperatures: Any, t: Any, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight)]
    return like[0], like[1], hidden.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, targets, temperatures, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, targets, temperatures, ctx.rest[1])
    ctx.rest = [ctx.rest[0], *ctx.rest[2:]]


def _backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    temperature, *rest = ctx.rest
    hidden, weight, grad_bias = _linear_logprob_backward(*tensors, temperature, bias, *rest, grad_logprob, grad_entropy)
    return hidden, weight, None, None, None, None if bias is None else grad_bias, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, bias: Tensor | None = None,
    softcap: float | None = None, mask: Tensor | None = None, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check("linear_logprob", hidden, weight, targets, temperature, bias, softcap)
    if mask is not None:
        check_mask("linear_logprob", hidden, mask)
        kept = mask.nonzero().squeeze(1)
        logprob, entropy = linear_logprob(
            hidden[kept], weight, targets[kept], _of(temperature, kept), bias, softcap, None, chunk_bytes
        )
        empty = logprob.new_zeros(len(hidden))
        return empty.index_copy(0, kept, logprob), empty.index_copy(0, kept, entropy)
    rows, one = softmax.split_temperature(temperature)
    out: tuple[Tensor, Tensor] = _linear_logprob(hidden, weight, targets, rows, one, bias, softcap, chunk_bytes)
    return out


def check_mask(op: str, hidden: Tensor, mask: Tensor) -> None:
    if mask.shape != hidden.shape[:1] or mask.device != hidden.device:
        raise ValueError(
            f"{op}: mask = a tensor of shape {tuple(mask.shape)} on {mask.device}, accepted is ({len(hidden)},) on {hidden.device}"
        )


# ---- linear_policy_loss ------------------------------------------------------------------------------------------------


class _PolicyLoss(torch.autograd.Function):
    """Computes the gradients with the loss and hands them to autograd, which scales them and tells DDP and FSDP."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float | Tensor,
        softcap: float | None, chunk_bytes: int, loss_fn: LossFn, whole: bool,
    ) -> Tensor:  # fmt: skip
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32, device=hidden.device)
        coefficients = None
        if whole:  # the loss couples rows of different chunks: log-probs of all first
            scored = _score(hidden, weight, targets, temperature, bias, softcap, chunk_bytes)
            total, *coefficients = _differentiate(loss_fn, *scored, slice(0, len(hidden)))
        for rows in _chunks(len(hidden), weight, chunk_bytes):
            logits = _logits(hidden[rows], weight, bias, softcap)
            logprob, entropy, stats = _logprob(logits, targets[rows], _of(temperature, rows))
            if coefficients is None:
                loss, c, e = _differentiate(loss_fn, logprob, entropy, rows)
                total = total + loss
            else:
                c, e = (x[rows] for x in coefficients)
            _add_chunk(sums, logits, rows, hidden, targets, temperature, entropy, stats, c, e, softcap)
        ctx.save_for_backward(*sums.cast(hidden, bias))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if x is None else x * grads[0].to(x.dtype) for x in ctx.saved_tensors]
        return *scaled, *[None] * 6


def _differentiate(loss_fn: LossFn, logprob: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dlogprob, dloss/dentropy) of these rows."""
    with torch.enable_grad():
        logprob, entropy = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = loss_fn(logprob, entropy, rows)
        if loss.dim() != 0:
            raise ValueError(f"linear_policy_loss: loss_fn returned shape {tuple(loss.shape)}, accepted is a scalar")
        grads = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True) if loss.requires_grad else (None, None)
    c, e = (torch.zeros_like(logprob) if g is None else g.contiguous() for g in grads)
    return loss.detach(), c, e


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: LossFn, *, temperature: float | Tensor = 1.0,
    bias: Tensor | None = None, softcap: float | None = None, level: str = "token", chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:  # fmt: skip
    check("linear_policy_loss", hidden, weight, targets, temperature, bias, softcap)
    if level not in ("token", "sequence"):
        raise ValueError(f"linear_policy_loss: level = {level!r}, accepted is 'token' or 'sequence'")
    out: Tensor = _PolicyLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, temperature, softcap, chunk_bytes, loss_fn, level == "sequence"
    )
    return out
