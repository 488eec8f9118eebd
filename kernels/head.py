"""The head of a policy without its logits: log-prob and entropy from hidden states, and the gradient of any loss of them.

Logits exist for a chunk of rows at a time, in fp32. `linear_logprob` is an ordinary differentiable op whose backward computes
them again: four matrix products. `policy_loss` calls the loss on each chunk while its logits are there and turns them into
their gradient in place: three. A row whose gradient is zero (masked, clipped, no advantage) stays out of the last two.

Shapes: N rows, n rows of a chunk, k of them with a gradient, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from duologue.kernels import backend, reference, softmax
from torch import Tensor

CPU_BYTES, GPU_BYTES, LEAST_ROWS = 16 * 2**20, 2 * 2**30, 256  # of logits at a time, unless the caller says
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Rows = slice | Tensor
Need = tuple[bool, bool, bool]  # gradients of hidden, weight, bias
LossFn = Callable[[Tensor, Tensor, Rows], Any]


class PolicyLoss(NamedTuple):
    loss: Tensor  # differentiable in hidden, weight and bias
    logprob: Tensor  # [N], without gradient; 0 where the mask is
    entropy: Tensor  # [N], likewise
    sums: dict[str, Tensor]  # what loss_fn gave beside the loss, summed over its calls


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] int64
    temperature: Tensor  # [N]
    bias: Tensor | None  # [V]
    softcap: float  # 0: off
    mask: Tensor | None  # [N] bool
    exact: bool
    chunk_bytes: int  # bytes of logits; 0: the default


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    exact: bool,
    chunk_bytes: int | None,
) -> Inputs:
    """The arguments of `op` as its kernels take them; ValueError for a shape, dtype, device or setting that they do not."""
    device, dtype = hidden.device.type, hidden.dtype
    backend.check(op, "hidden", hidden, (None, None), None, device)
    if dtype not in DTYPES:
        raise ValueError(f"{op}: hidden is {dtype}, accepted is one of {', '.join(map(str, DTYPES))}")
    N, H = hidden.shape
    backend.check(op, "weight", weight, (None, H), dtype, device)
    V = len(weight)
    if not 0 < V < 2**28:  # the Triton grid's second dimension
        raise ValueError(f"{op}: weight has {V} rows, accepted is 1 to 2^28 - 1")
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature = {temperature}, accepted is a finite number above 0")
        temperature = torch.full((N,), temperature, dtype=wide(hidden), device=hidden.device)
    temperature = temperature.to(wide(hidden))
    for name, given, shape, wanted in (
        ("targets", targets, (N,), torch.int64),
        ("temperature", temperature, (N,), None),
        ("bias", bias, (V,), dtype),
        ("mask", mask, (N,), torch.bool),
    ):
        if given is not None:
            backend.check(op, name, given, shape, wanted, device)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap = {softcap}, accepted is None or a finite number above 0")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"{op}: chunk_bytes = {chunk_bytes}, accepted is None or a number above 0")
    return Inputs(hidden, weight, targets, temperature, bias, softcap or 0.0, mask, exact, chunk_bytes or 0)


def check_values(op: str, x: Inputs) -> None:
    """ValueError for a target or a temperature out of range: on a GPU this waits for them."""
    V = len(x.weight)
    wrong = (x.targets < 0) | (x.targets >= V) | ~((x.temperature > 0) & x.temperature.isfinite())
    wrong = wrong if x.mask is None else wrong & x.mask
    if bool(wrong.any()):
        n = int(wrong.nonzero()[0])
        row = f"row {n} has target {int(x.targets[n])} and temperature {float(x.temperature[n]):.6g}"
        raise ValueError(f"{op}: {row}, accepted is 0 to {V - 1} and a finite number above 0")


class Compaction:
    """Which active row goes to each of the first k places: `source` [n] int64, -1 behind them; no step of it waits for a device.

    A row that is there already stays, the others fill the gaps: no place that is written is another row's source, so a kernel may
    move rows within one buffer in any order. On a GPU `count` waits for k alone, which sets out for the host at once: what is
    launched before it is asked for runs meanwhile.
    """

    def __init__(self, active: Tensor) -> None:
        n, place = len(active), torch.arange(len(active), device=active.device)
        k = active.sum()
        stays, gaps, moves = active & (place < k), ~active & (place < k), active & (place >= k)
        movers = place.new_zeros(n + 1).scatter_(0, torch.where(moves, moves.cumsum(0) - 1, n), place)
        self.source = torch.where(
            stays, place, torch.where(gaps, movers[(gaps.cumsum(0) - 1).clamp_min(0)], -1)
        )
        self._k, self._sent = k, None
        if k.is_cuda:
            self._k = torch.empty((), dtype=k.dtype, pin_memory=True).copy_(k, non_blocking=True)
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def count(self) -> int:
        if self._sent is not None:
            self._sent.synchronize()
        return int(self._k)


class Head:
    """The head of one call, a chunk of rows at a time, and the gradients as they accumulate, in fp32 (float64 for float64)."""

    def __init__(self, inputs: Inputs, need: Need = (False, False, False)) -> None:
        self.inputs, self.wide = inputs, wide(inputs.hidden)
        self.hidden, self.weight = inputs.hidden.contiguous(), inputs.weight.contiguous()
        self.bias = None if inputs.bias is None else inputs.bias.contiguous()
        self.N, self.V, self.H = len(self.hidden), *self.weight.shape
        self.kernels, self.cpp, self.triton = (
            backend.takes(self.hidden),
            backend.cpp(self.hidden),
            backend.triton(self.hidden),
        )
        self.in_place = (
            self.cpp or self.hidden.dtype == self.wide
        )  # the gradient of logits, in hidden's dtype
        row = self.V * (
            (4 if self.in_place else 6 if self.kernels else 16) + (4 if inputs.softcap else 0)
        )  # bytes
        budget = inputs.chunk_bytes or max(
            CPU_BYTES if self.hidden.device.type == "cpu" else GPU_BYTES, LEAST_ROWS * row
        )
        self.step = max(1, min(self.N, budget // row))
        self.buffer = self.new(self.step, self.V) if self.kernels else None
        self.grad_hidden = torch.zeros_like(self.hidden) if need[0] else None
        self.grad_weight = self.new(self.V, self.H).zero_() if need[1] else None
        self.grad_bias = self.new(self.V).zero_() if need[2] else None
        self.wide_weight = self.weight.float() if self.cpp and need[0] else self.weight

    def new(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=self.wide)

    def chunks(self, index: Tensor | None) -> Iterator[Rows]:
        """All rows, as slices, or those given."""
        n = self.N if index is None else len(index)
        for rows in (slice(a, min(a + self.step, n)) for a in range(0, n, self.step)):
            yield rows if index is None else index[rows]

    def project(self, rows: Rows) -> Tensor:
        """The chunk's logits [n, V]."""
        x, softcap = self.hidden[rows], self.inputs.softcap
        if self.buffer is not None:
            logits = backend.linear(
                x, self.weight, self.bias, self.wide, self.inputs.exact, self.buffer[: len(x)]
            )
        else:
            logits = torch.nn.functional.linear(x.to(self.wide), self.weight.to(self.wide), self.bias)
        return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in fp32; on a GPU bf16 and fp16 are multiplied as they are, with fp32 sums."""
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.to(self.wide), b.to(self.wide))

    def stats(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(log-prob [n], entropy [n], [n, 2] for the kernels' gradient: the largest logit, the log of the sum relative to it)."""
        targets, temperature = self.inputs.targets[rows], self.inputs.temperature[rows]
        if self.kernels:
            return softmax.logprob(logits, targets, temperature, 1.0, keep_stats=True)
        return *reference.logprob(logits, targets, temperature), self.new(len(logits), 2)

    def gradient(
        self, logits: Tensor, rows: Rows, stats: Tensor, entropy: Tensor, g: Tensor, h: Tensor
    ) -> None:
        """Turn logits into their gradient, given those of log-prob and entropy [n], and add what it gives to those needed."""
        moved = Compaction((g != 0) | (h != 0))
        softcap, targets, temperature = (
            self.inputs.softcap,
            self.inputs.targets[rows],
            self.inputs.temperature[rows],
        )
        slope = 1 - (logits / softcap).square_() if softcap else None
        if self.triton:  # the rows' gradients are on their way while their number is
            dz = logits if self.in_place else self.hidden.new_empty(logits.shape)
            softmax.grad_logits(logits, targets, temperature, 1.0, entropy, stats, g, h, dz, moved.source)
        if (k := moved.count()) == 0:
            return
        source = None if k == len(logits) else moved.source[:k]
        if self.triton:
            dz = dz[:k]
        elif self.kernels:
            dz = logits[:k] if self.in_place else self.hidden.new_empty(k, self.V)
            softmax.grad_logits(logits, targets, temperature, 1.0, entropy, stats, g, h, dz, source)
        else:
            with torch.enable_grad():
                z = logits.requires_grad_()
                dz = torch.autograd.grad(reference.logprob(z, targets, temperature), z, (g, h))[0]
            dz = dz if source is None else dz[source]
        if slope is not None:
            dz.mul_(slope if source is None else slope[source])
        at = rows if source is None else source + rows.start if isinstance(rows, slice) else rows[source]
        self.add_products(dz, at)

    def add_products(self, dz: Tensor, rows: Rows) -> None:
        x, k = self.hidden[rows], len(dz)
        if self.cpp:
            if self.grad_hidden is not None:
                out = self.new(k, self.H)
                backend.matmul(dz, self.wide_weight, out, (k, self.V, self.H, self.V, 1), False)
                self.grad_hidden[rows] = out.to(x.dtype)
            if self.grad_weight is not None:
                backend.matmul(dz, x.float(), self.grad_weight, (self.V, k, self.H, 1, self.V), True)
            if self.grad_bias is not None:
                backend.matmul(torch.ones(k), dz, self.grad_bias, (1, k, self.V, k, 1), True)
            return
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = self.product(dz, self.weight).to(x.dtype)
        if self.grad_weight is not None:
            if dz.is_cuda and dz.dtype != self.wide:
                torch.addmm(self.grad_weight, dz.t(), x, out_dtype=torch.float32, out=self.grad_weight)
            else:
                self.grad_weight.addmm_(dz.t().to(self.wide), x.to(self.wide))
        if self.grad_bias is not None:
            self.grad_bias += dz.sum(0, dtype=self.wide)

    def gradients(self) -> tuple[Tensor | None, ...]:
        found = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return tuple(None if x is None else x.to(self.hidden.dtype) for x in found)


def score(head: Head, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], stats [N, 2]) of the rows `index`, 0 elsewhere."""
    logprob, entropy, stats = head.new(head.N).zero_(), head.new(head.N).zero_(), head.new(head.N, 2).zero_()
    for rows in head.chunks(index):
        logprob[rows], entropy[rows], stats[rows] = head.stats(head.project(rows), rows)
    return logprob, entropy, stats


def accumulate(head: Head, stats: Tensor, entropy: Tensor, g: Tensor, h: Tensor) -> None:
    """Compute the logits again where a gradient [N] is not zero, and add what they give."""
    for rows in head.chunks(((g != 0) | (h != 0)).nonzero().squeeze(1)):
        head.gradient(head.project(rows), rows, stats[rows], entropy[rows], g[rows], h[rows])


def kept(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.nonzero().squeeze(1)


# ---- linear_logprob --------------------------------------------------------------------------------------------------

_OUT = "(Tensor, Tensor, Tensor)"
_ARGS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, float softcap, Tensor? mask, bool exact, "
    "int chunk_bytes"
)
_GRADS = "Tensor entropy, Tensor stats, Tensor g, Tensor h, bool[] need"


@torch.library.custom_op("duologue::linear_logprob", mutates_args=(), schema=f"({_ARGS}) -> {_OUT}")
def linear_logprob(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*args)
    check_values("linear_logprob", inputs)
    return score(Head(inputs), kept(inputs.mask))


@linear_logprob.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden: Tensor = args[0]
    N, dtype = hidden.shape[0], wide(hidden)
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty((N, 2), dtype=dtype),
    )


@torch.library.custom_op(
    "duologue::linear_logprob_backward", mutates_args=(), schema=f"({_ARGS}, {_GRADS}) -> {_OUT}"
)
def linear_logprob_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, (entropy, stats, g, h, need) = Inputs(*args[:9]), args[9:]
    head = Head(inputs, tuple(need))
    if inputs.mask is not None:
        g, h = g * inputs.mask, h * inputs.mask
    accumulate(head, stats, entropy, g, h)
    return tuple(inputs.hidden.new_empty(0) if x is None else x for x in head.gradients())


@linear_logprob_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, need = args[0], args[1], args[-1]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softcap, mask, ctx.exact, ctx.chunk_bytes = inputs
    ctx.save_for_backward(*tensors, mask, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, g: Tensor, h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, temperature, bias, mask, entropy, stats = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    inputs = Inputs(hidden, weight, targets, temperature, bias, ctx.softcap, mask, ctx.exact, ctx.chunk_bytes)
    grads = linear_logprob_backward(*inputs, entropy, stats, g, h, need)
    a, b, c = (grad if wanted else None for grad, wanted in zip(grads, need, strict=True))
    return a, b, None, None, c, None, None, None, None


linear_logprob.register_autograd(_backward, setup_context=_setup)


# ---- policy_loss -----------------------------------------------------------------------------------------------------


def _loss_and_sums(
    loss_fn: LossFn, logprob: Tensor, entropy: Tensor, rows: Rows, sums: dict[str, Tensor]
) -> Tensor:
    """The loss; what loss_fn gives beside it is added to `sums`."""
    loss: Tensor
    found = loss_fn(logprob, entropy, rows)
    loss, more = found if isinstance(found, tuple) else (found, {})
    if loss.dim():
        raise ValueError(
            f"linear_policy_loss: loss_fn returned shape {tuple(loss.shape)}, accepted is a scalar"
        )
    for name, value in more.items():
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
        head, index = Head(inputs, need), kept(inputs.mask)
        n = head.N if index is None else len(index)
        logprob, entropy, loss = head.new(head.N).zero_(), head.new(head.N).zero_(), head.new().zero_()
        if by_sequence and n > head.step:
            logprob, entropy, stats = score(head, index)
            rows: Rows = slice(0, n) if index is None else index
            loss, *grads = _coefficients(loss_fn, logprob[rows], entropy[rows], rows, sums, any(need))
            g, h = torch.zeros_like(logprob), torch.zeros_like(logprob)
            g[rows], h[rows] = grads
            accumulate(head, stats, entropy, g, h)
        else:
            for rows in head.chunks(index):
                logits = head.project(rows)
                logprob[rows], entropy[rows], stats = head.stats(logits, rows)
                part, *grads = _coefficients(loss_fn, logprob[rows], entropy[rows], rows, sums, any(need))
                loss = loss + part
                head.gradient(logits, rows, stats, entropy[rows], *grads)
        ctx.grads = head.gradients()
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_policy_loss: the first backward handed the gradients over, a second has none"
            )
        grads, ctx.grads = ctx.grads, None
        if grad_loss.device.type != "cpu" or float(grad_loss) != 1.0:
            grads = [None if x is None else x.mul_(grad_loss) for x in grads]
        return *grads, None, None, None, None


def policy_loss(inputs: Inputs, loss_fn: LossFn, level: str) -> PolicyLoss:
    if level not in ("token", "sequence"):
        raise ValueError(f"linear_policy_loss: level = {level!r}, accepted is 'token' or 'sequence'")
    sums: dict[str, Tensor] = {}
    if (
        torch.compiler.is_compiling() and inputs.mask is None
    ):  # loss_fn is traced too: one call of it, and a fourth product
        logprob, entropy, _ = linear_logprob(*inputs)
        loss = _loss_and_sums(loss_fn, logprob, entropy, slice(0, len(logprob)), sums)
        return PolicyLoss(loss, logprob.detach(), entropy.detach(), sums)
    out: PolicyLoss = _chunked_policy_loss(inputs, loss_fn, level == "sequence", sums)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _chunked_policy_loss(
    inputs: Inputs, loss_fn: LossFn, by_sequence: bool, sums: dict[str, Tensor]
) -> PolicyLoss:
    check_values("linear_policy_loss", inputs)
    found = _PolicyLoss.apply(inputs.hidden, inputs.weight, inputs.bias, inputs, loss_fn, by_sequence, sums)  # type: ignore[no-untyped-call]
    return PolicyLoss(found[0], found[1], found[2], sums)
