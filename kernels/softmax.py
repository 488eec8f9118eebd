"""Log-prob, entropy and sampling from logits: the contracts, the calls of C++ and Triton, and the
`torch.library` ops.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels.backend import DTYPES, check, lib, library_op, pointers, triton, with_gradients
from torch import Tensor

# temperature, top_k, top_p, min_p, seed, position, each [N]
Settings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Tensors = tuple[Tensor, ...]
# token [N], log-prob [N], entropy [N]; the ids of all supports, and where each row's begin and end [N + 1]
Samples = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_logits(op: str, logits: Tensor) -> tuple[int, int]:
    check(op, logits.device.type, logits=(logits, (None, None), None))
    N, V = logits.shape
    if V == 0:
        raise ValueError(f"{op}: logits has an empty vocabulary")
    return N, V


# ---- log-prob and entropy ----------------------------------------------------------------------------------


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """(one per row, one for all): the kernel takes either; making a tensor costs as much as a short call."""
    if isinstance(temperature, Tensor):
        return temperature.float().contiguous(), 1.0
    return None, float(temperature)


def forward(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], what the backward needs [N, 2])."""
    logits, targets = logits.contiguous(), targets.contiguous()
    temperatures = None if temperatures is None else temperatures.contiguous()
    N, V = _check_logits("logprob", logits)
    check(
        "logprob",
        logits.device.type,
        targets=(targets, (N,), torch.int64),
        temperature=(temperatures, (N,), torch.float32),
    )
    logprob, entropy = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    stats = logits.new_empty((N, 2), dtype=torch.float32)
    if triton(logits):
        from duologue.kernels.gpu import softmax as gpu_softmax

        gpu_softmax.logprob(logits, targets, temperatures, temperature, logprob, entropy, stats)
        return logprob, entropy, stats
    inputs = (*pointers(logits, targets, temperatures), temperature)
    outputs = pointers(logprob, entropy, stats)
    bad = lib().logprob(*inputs, *outputs, N, V, DTYPES[logits.dtype])
    if bad:
        row = bad - 1
        used = temperature if temperatures is None else float(temperatures[row])
        raise ValueError(
            f"logprob: row {row} has target {int(targets[row])} and temperature {used}, "
            f"accepted is 0 to {V - 1} and above 0"
        )
    return logprob, entropy, stats


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    return forward(logits, targets, *split_temperature(temperature))[:2]


def backward(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    from_row: Tensor | None = None,
) -> None:
    """Row i of `out` becomes the gradient of row from_row[i] (None: i) of the logits, given those of its
    log-prob and entropy.

    `out` may be the first rows of the logits, if no row is written that another is made from. On Triton a
    negative from_row leaves the row as it is.
    """
    logits, targets, entropy, stats, grad_logprob, grad_entropy = (
        x.contiguous() for x in (logits, targets, entropy, stats, grad_logprob, grad_entropy)
    )
    temperatures = None if temperatures is None else temperatures.contiguous()
    assert out.is_contiguous()
    inputs = (entropy, stats, grad_logprob, grad_entropy)
    if triton(logits):
        from duologue.kernels.gpu import softmax as gpu_softmax

        gpu_softmax.logprob_backward(logits, targets, temperatures, temperature, *inputs, from_row, out)
        return
    of_logits = (*pointers(logits, targets, temperatures), temperature)
    tensors = pointers(*inputs, out, from_row)
    lib().logprob_backward(*of_logits, *tensors, *out.shape, DTYPES[logits.dtype])


# ---- sampling ----------------------------------------------------------------------------------------------


def check_settings(op: str, settings: Tensors, N: int, device: str) -> Tensors:
    """The settings, contiguous; ValueError for one that does not fit."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    of_row = zip(names, settings, dtypes, strict=True)
    check(op, device, **{name: (x, (N,), dtype) for name, x, dtype in of_row})
    return tuple(x.contiguous() for x in settings)


def call_sampler(
    op: str, call: Callable[..., int], inputs: list[int], settings: Tensors, N: int, *sizes: float
) -> Samples:
    """Call a sampler of the C++ library: addresses of its inputs and settings, of the outputs, then sizes."""
    token, counts, stash = (torch.empty(N, dtype=torch.int64) for _ in range(3))
    logprob, entropy = (torch.empty(N, dtype=torch.float32) for _ in range(2))
    bad = call(*inputs, *pointers(*settings, token, logprob, entropy, counts, stash), N, *sizes)
    if bad:
        names = ("temperature", "top_k", "top_p", "min_p")
        given = ", ".join(f"{name} = {x[bad - 1].item()}" for name, x in zip(names, settings, strict=False))
        accepted = "accepted are temperature and top_k from 0, top_p and min_p from 0 to 1"
        raise ValueError(f"{op}: row {bad - 1} has {given}; {accepted}")
    offsets = torch.zeros(N + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return token, logprob, entropy, take_supports(counts, stash), offsets


def take_supports(counts: Tensor, stash: Tensor) -> Tensor:
    """The ids of all supports, one after the other, int32; `stash` is where the C++ library has them until
    now."""
    ids = torch.empty(int(counts.sum()), dtype=torch.int32)
    lib().take_kept(*pointers(counts, stash, ids), counts.numel())
    return ids


def _on_triton(op: str, logits: Tensor, settings: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token [N], log-prob [N], entropy [N], the largest logit [N] that truncation removed); `logits`
    contiguous."""
    from duologue.kernels.gpu import softmax as gpu_softmax

    N, _ = _check_logits(op, logits)
    settings = check_settings(op, settings, N, logits.device.type)
    token = logits.new_empty(N, dtype=torch.int64)
    logprob, entropy = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    cuts = gpu_softmax.sample(logits, settings, token, logprob, entropy)
    return token, logprob, entropy, cuts


def sample(logits: Tensor, *settings: Tensor) -> Samples:
    logits = logits.contiguous()
    if triton(logits):
        token, logprob, entropy, cuts = _on_triton("sample", logits, settings)
        cuts = cuts.unsqueeze(1)
        support = (logits > cuts) & (cuts > float("-inf"))
        support &= ~support.all(1, keepdim=True)
        offsets = torch.nn.functional.pad(support.sum(1).cumsum(0), (1, 0))
        return token, logprob, entropy, support.nonzero()[:, 1].int(), offsets
    N, V = _check_logits("sample", logits)
    settings = check_settings("sample", settings, N, "cpu")
    return call_sampler("sample", lib().sample, pointers(logits), settings, N, V, DTYPES[logits.dtype])


def sample_bounded(logits: Tensor, settings: Tensors, most: int) -> Samples:
    """On Triton only; see `ops.sample_bounded`. Launches and allocations alone, nothing that waits."""
    from duologue.kernels.gpu import softmax as gpu_softmax

    logits = logits.contiguous()
    token, logprob, entropy, cuts = _on_triton("sample_bounded", logits, settings)
    support = logits.new_empty((len(logits), most), dtype=torch.int32)
    sizes = logits.new_empty(len(logits), dtype=torch.int32)
    gpu_softmax.keep(logits, cuts, support, sizes)
    return token, logprob, entropy, support, sizes


def bounded(samples: Samples, most: int) -> Samples:
    """What `sample` gave, in the form of `sample_bounded`."""
    token, logprob, entropy, ids, offsets = samples
    sizes = offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(token), device=token.device), sizes)
    column = torch.arange(len(ids), device=token.device) - offsets[row]
    fits = column < most
    support = ids.new_zeros((len(token), most))
    support[row[fits], column[fits]] = ids[fits]
    return token, logprob, entropy, support, sizes.int()


# ---- torch.library ops -------------------------------------------------------------------------------------


forward_op = library_op("logprob", forward)


@forward_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    N = logits.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N,), (N, 2)))


def _new_gradient(*inputs: Any) -> Tensor:
    grad = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    backward(grad, *inputs)
    return grad


backward_op = library_op(
    "logprob_backward",
    _new_gradient,
    0,
    schema="(Tensor logits, Tensor targets, Tensor? temperatures, float temperature, Tensor entropy, "
    "Tensor stats, Tensor grad_logprob, Tensor grad_entropy) -> Tensor",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, temperatures, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, temperatures, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(
    run: Any, ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, entropy, stats = ctx.saved_tensors
    inputs = (logits, targets, temperatures, ctx.temperature)
    return run(*inputs, entropy, stats, grad_logprob, grad_entropy), None, None, None


_forward_grad = with_gradients(forward_op, forward, _setup, _backward, backward_op, _new_gradient)


def logprob_traced(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> Any:
    return _forward_grad(logits, targets, *split_temperature(temperature))[:2]


sample_op = library_op(
    "sample",
    sample,
    schema="(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
    "Tensor position) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@sample_op.register_fake
def _(logits: Tensor, *_: Any) -> Samples:
    """How many tokens the supports have is known only to the kernel."""
    new = logits.new_empty
    N, E = logits.shape[0], torch.library.get_ctx().new_dynamic_size()
    token, offsets = (new(size, dtype=torch.int64) for size in (N, N + 1))
    logprob, entropy = (new(N, dtype=torch.float32) for _ in range(2))
    return token, logprob, entropy, new(E, dtype=torch.int32), offsets
