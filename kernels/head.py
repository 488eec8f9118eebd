"""The head of a policy without its logits: log-prob and entropy from hidden states, and the gradient of any
loss of them.

Logits exist for a chunk of rows at a time, in fp32, and are turned into their gradient in place.
`linear_logprob_op` is an ordinary differentiable op whose backward computes them again: four matrix products.
policy_loss.py takes three. A row whose gradient is zero (masked, clipped, no advantage) stays out of the last
two.

Shapes: N rows, n rows of a chunk, k of them with a gradient, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from duologue.kernels import backend, linear, reference, softmax
from torch import Tensor

CPU_BYTES = 16 * 2**20  # of logits at a time, unless the caller says,
MIN_ROWS = 256  # or what this many rows need
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Rows = slice | Tensor
Need = tuple[bool, bool, bool]  # gradients of hidden, weight, bias


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


def gpu_bytes(total: int) -> int:
    """Of logits at a time on a GPU that has `total` bytes: the power of two next below a sixteenth of it, 8
    GiB on 141 GB. Each chunk reads and writes the fp32 gradient of the whole weight once more.

    Not by what is free: chunks are summed one after the other, and bits shall not depend on what else runs.
    """
    return 1 << (max(total // 16, 2**28).bit_length() - 1)


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
    """The arguments of `op` as its kernels take them; ValueError for a shape, dtype, device or setting that
    they do not."""
    device, dtype = hidden.device.type, hidden.dtype
    backend.check(op, device, hidden=(hidden, (None, None), None))
    if dtype not in DTYPES:
        raise ValueError(f"{op}: hidden is {dtype}, accepted is one of {', '.join(map(str, DTYPES))}")
    N, H = hidden.shape
    backend.check(op, device, weight=(weight, (None, H), dtype))
    V = len(weight)
    if not 0 < V < 2**28:  # the Triton grid's second dimension
        raise ValueError(f"{op}: weight has {V} rows, accepted is 1 to 2^28 - 1")
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature = {temperature}, accepted is a finite number above 0")
        temperature = torch.full((N,), temperature, dtype=wide(hidden), device=hidden.device)
    temperature = temperature.to(wide(hidden))
    backend.check(
        op,
        device,
        targets=(targets, (N,), torch.int64),
        temperature=(temperature, (N,), None),
        bias=(bias, (V,), dtype),
        mask=(mask, (N,), torch.bool),
    )
    backend.check_softcap(op, softcap)
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"{op}: chunk_bytes = {chunk_bytes}, accepted is None or a number above 0")
    return Inputs(hidden, weight, targets, temperature, bias, softcap or 0.0, mask, exact, chunk_bytes or 0)


def check_values(op: str, x: Inputs) -> None:
    """ValueError for a target or a temperature out of range: on a GPU this waits for them."""
    V = len(x.weight)
    wrong = (x.targets < 0) | (x.targets >= V) | ~((x.temperature > 0) & x.temperature.isfinite())
    if x.mask is not None:
        wrong &= x.mask
    if bool(wrong.any()):
        n = int(wrong.nonzero()[0])
        row = f"row {n} has target {int(x.targets[n])} and temperature {float(x.temperature[n]):.6g}"
        raise ValueError(f"{op}: {row}, accepted is 0 to {V - 1} and a finite number above 0")


class Compaction:
    """Which active row goes to each of the first k places, k being their number; no step of it waits for a
    device.

        row        0   1   2   3   4
        active     -   x   -   x   x    k = 3 places: 0, 1 and 2
        movers                 3   4    the active rows behind the places, in order
        from_row   3   1   4  -1  -1    row 1 stays; the movers fill the gaps, places 0 and 2

    No place that is written has a row that is still to be read, so a kernel may move rows within one buffer
    in any order. On a GPU `count` waits for k alone, which sets out for the host at once: what is launched
    before it is asked for runs meanwhile.
    """

    def __init__(self, active: Tensor) -> None:
        n = len(active)
        row = torch.arange(n, device=active.device)
        k = active.sum()
        is_place = row < k
        is_gap = is_place & ~active
        is_mover = active & ~is_place
        movers = row.new_zeros(n + 1)  # all rows that do not move are written behind them, to element n
        movers.scatter_(0, torch.where(is_mover, is_mover.cumsum(0) - 1, n), row)
        into_gap = movers[(is_gap.cumsum(0) - 1).clamp_min(0)]
        self.from_row = torch.where(active & is_place, row, torch.where(is_gap, into_gap, -1))  # [n] int64
        self._k = k
        self._sent = None
        if k.is_cuda:
            self._k = torch.empty((), dtype=k.dtype, pin_memory=True).copy_(k, non_blocking=True)
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record(torch.cuda.current_stream(k.device))

    def count(self) -> int:
        if self._sent is not None:
            self._sent.synchronize()
        return int(self._k)


class Head:
    """The head of one call, a chunk of rows at a time, and the gradients as they accumulate, in fp32 (float64
    for float64)."""

    def __init__(self, inputs: Inputs, need: Need = (False, False, False)) -> None:
        self.inputs = inputs
        self.wide = wide(inputs.hidden)
        self.hidden, self.weight = inputs.hidden.contiguous(), inputs.weight.contiguous()
        self.bias = None if inputs.bias is None else inputs.bias.contiguous()
        self.N, self.H = self.hidden.shape
        self.V = len(self.weight)
        self.library = backend.library(self.hidden)
        # The gradient of the logits has the dtype of hidden, on C++ fp32: whether it is wide, and can take
        # their place. In fp16 it stays wide: a loss scale comes later, and must find what is small.
        half = self.hidden.dtype == torch.float16
        self.in_place = self.library == "cpp" or half or self.hidden.dtype == self.wide
        self.step = self._rows_of_a_chunk()
        self.buffer = None if self.library == "reference" else self.new(self.step, self.V)
        kept = self.wide if half else self.hidden.dtype
        self.grad_hidden = torch.zeros_like(self.hidden, dtype=kept) if need[0] else None
        self.grad_weight = self.new(self.V, self.H).zero_() if need[1] else None
        self.grad_bias = self.new(self.V).zero_() if need[2] else None
        self.narrow = backend.multiplies_bf16(self.hidden)  # products take bf16 as it is, and round dz
        widen = self.library == "cpp" and need[0] and not self.narrow
        self.wide_weight = self.weight.float() if widen else self.weight

    def _rows_of_a_chunk(self) -> int:
        bytes_per_logit = {"cpp": 4, "triton": 4 if self.in_place else 6, "reference": 16}[self.library]
        if self.inputs.softcap:
            bytes_per_logit += 4
        row = self.V * bytes_per_logit
        device = self.hidden.device
        default = CPU_BYTES
        if device.type == "cuda":
            default = gpu_bytes(torch.cuda.get_device_properties(device).total_memory)
        budget = self.inputs.chunk_bytes or max(default, MIN_ROWS * row)
        return max(1, min(self.N, budget // row))

    def new(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=self.wide)

    def chunks(self, index: Tensor | None) -> Iterator[Rows]:
        """All rows, as slices, or those of the index."""
        n = self.N if index is None else len(index)
        for start in range(0, n, self.step):
            rows = slice(start, min(start + self.step, n))
            yield rows if index is None else index[rows]

    def project(self, rows: Rows) -> Tensor:
        """The chunk's logits [n, V]."""
        x = self.hidden[rows]
        arguments = (x, self.weight, self.bias, self.wide, self.inputs.exact)
        if self.buffer is None:
            logits = reference.linear(*arguments)
        else:
            logits = linear.forward(*arguments, self.buffer[: len(x)])
        return reference.softcapped(logits, self.inputs.softcap, out=logits)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in fp32; on a GPU bf16 and fp16 are multiplied as they are, with fp32 sums."""
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.to(self.wide), b.to(self.wide))

    def stats(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(log-prob [n], entropy [n], [n, 2] for the kernels' gradient: the largest logit, the log of the sum
        relative to it)."""
        targets, temperature = self.inputs.targets[rows], self.inputs.temperature[rows]
        if self.library == "reference":
            return *reference.logprob(logits, targets, temperature), self.new(len(logits), 2).zero_()
        return softmax.forward(logits, targets, temperature, 1.0)

    def gradient(
        self, logits: Tensor, rows: Rows, stats: Tensor, entropy: Tensor, g: Tensor, h: Tensor
    ) -> None:
        """Turn logits into their gradient, given those of log-prob and entropy (g and h, [n]), and add the
        products of it."""
        moved = Compaction((g != 0) | (h != 0))
        targets, temperature = self.inputs.targets[rows], self.inputs.temperature[rows]
        softcap = self.inputs.softcap
        slope = 1 - (logits / softcap).square_() if softcap else None
        inputs = (logits, targets, temperature, 1.0, entropy, stats, g, h)
        if self.library == "triton":  # launched while k is on its way
            dz = logits if self.in_place else self.hidden.new_empty(logits.shape)
            softmax.backward(dz, *inputs, moved.from_row)
        k = moved.count()
        if k == 0:
            return
        from_row = None if k == len(logits) else moved.from_row[:k]
        if self.library == "triton":
            dz = dz[:k]
        elif self.library == "cpp":
            dz = logits[:k]
            softmax.backward(dz, *inputs, from_row)
        else:
            dz = reference.logprob_backward(logits, targets, temperature, entropy, g, h)
            dz = dz if from_row is None else dz[from_row]
        if slope is not None:
            dz.mul_(slope if from_row is None else slope[from_row])
        if from_row is None:
            at = rows
        elif isinstance(rows, slice):
            at = from_row + rows.start
        else:
            at = rows[from_row]
        self.add_products(dz, at)

    def add_products(self, dz: Tensor, rows: Rows) -> None:
        """Add what dz [k, V], the gradient of these rows' logits, gives to hidden, weight and bias."""
        x = self.hidden[rows]
        k = len(dz)
        if self.library == "cpp":
            if self.grad_hidden is not None:
                out = self.new(k, self.H)
                linear.matmul(dz, self.wide_weight, out, (k, self.V, self.H, self.V, 1), False, self.narrow)
                self.grad_hidden[rows] = out.to(self.grad_hidden.dtype)
            if self.grad_weight is not None:
                x = x.contiguous() if self.narrow else x.float()
                linear.matmul(dz, x, self.grad_weight, (self.V, k, self.H, 1, self.V), True, self.narrow)
            if self.grad_bias is not None:
                linear.matmul(torch.ones(k), dz, self.grad_bias, (1, k, self.V, k, 1), add=True)
            return
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = self.product(dz, self.weight).to(self.grad_hidden.dtype)
        if self.grad_weight is not None:
            if dz.is_cuda and dz.dtype != self.wide:
                torch.addmm(self.grad_weight, dz.t(), x, out_dtype=torch.float32, out=self.grad_weight)
            else:
                self.grad_weight.addmm_(dz.t().to(self.wide), x.to(self.wide))
        if self.grad_bias is not None:
            self.grad_bias += dz.sum(0, dtype=self.wide)

    def sums(self) -> list[Tensor | None]:
        """The gradients of hidden, in its dtype (fp16: in fp32), and of weight and bias, fp32 or wider; None
        where none was needed."""
        return [self.grad_hidden, self.grad_weight, self.grad_bias]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of hidden, weight and bias, in their dtype; None where none was needed."""
        return tuple(None if grad is None else grad.to(self.hidden.dtype) for grad in self.sums())


def score(head: Head, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], stats [N, 2]) of the rows `index`, 0 elsewhere."""
    logprob, entropy = head.new(head.N).zero_(), head.new(head.N).zero_()
    stats = head.new(head.N, 2).zero_()
    for rows in head.chunks(index):
        logprob[rows], entropy[rows], stats[rows] = head.stats(head.project(rows), rows)
    return logprob, entropy, stats


def accumulate(head: Head, stats: Tensor, entropy: Tensor, g: Tensor, h: Tensor) -> None:
    """Compute the logits again where a gradient [N] is not zero, and add what they give."""
    for rows in head.chunks(((g != 0) | (h != 0)).nonzero().squeeze(1)):
        head.gradient(head.project(rows), rows, stats[rows], entropy[rows], g[rows], h[rows])


def masked_rows(mask: Tensor | None) -> Tensor | None:
    """Where the mask is True; None stands for all rows."""
    return None if mask is None else mask.nonzero().squeeze(1)


# ---- linear_logprob ----------------------------------------------------------------------------------------

_OUT = "(Tensor, Tensor, Tensor)"
_ARGS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, float softcap, "
    "Tensor? mask, bool exact, int chunk_bytes"
)
_GRADS = "Tensor entropy, Tensor stats, Tensor g, Tensor h, bool[] need"


def _logprob(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*args)
    check_values("linear_logprob", inputs)
    return score(Head(inputs), masked_rows(inputs.mask))


linear_logprob_op = backend.library_op("linear_logprob", _logprob, schema=f"({_ARGS}) -> {_OUT}")


@linear_logprob_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden: Tensor = args[0]
    N = hidden.shape[0]
    shapes = ((N,), (N,), (N, 2))
    return tuple(hidden.new_empty(shape, dtype=wide(hidden)) for shape in shapes)


def _logprob_backward(*args: Any) -> tuple[Tensor, ...]:
    *of_inputs, entropy, stats, g, h, need = args
    inputs = Inputs(*of_inputs)
    head = Head(inputs, tuple(need))
    if inputs.mask is not None:
        g, h = g * inputs.mask, h * inputs.mask
    accumulate(head, stats, entropy, g, h)
    return tuple(inputs.hidden.new_empty(0) if x is None else x for x in head.gradients())


linear_logprob_backward_op = backend.library_op(
    "linear_logprob_backward", _logprob_backward, schema=f"({_ARGS}, {_GRADS}) -> {_OUT}"
)


@linear_logprob_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, need = args[0], args[1], args[-1]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if n else 0) for shape, n in zip(shapes, need, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softcap, mask, ctx.exact, ctx.chunk_bytes = inputs
    ctx.save_for_backward(*tensors, mask, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(run: Any, ctx: Any, g: Tensor, h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask, entropy, stats = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    inputs = (*tensors, ctx.softcap, mask, ctx.exact, ctx.chunk_bytes)
    grads = run(*inputs, entropy, stats, g, h, need)
    of_hidden, of_weight, of_bias = (
        grad if needed else None for grad, needed in zip(grads, need, strict=True)
    )
    return of_hidden, of_weight, None, None, of_bias, None, None, None, None


linear_logprob_grad = backend.with_gradients(
    linear_logprob_op, _logprob, _setup, _backward, linear_logprob_backward_op, _logprob_backward
)
