"""Log-prob, entropy and sampling on the C++ kernels: the contracts, and `torch.library` ops with gradients.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels.backend import DTYPES, check, family, lib, pointers, triton
from torch import Tensor


def _check_logits(op: str, logits: Tensor) -> tuple[int, int]:
    check(op, "logits", logits, (None, None), None, logits.device.type)
    N, V = logits.shape
    if V == 0:
        raise ValueError(f"{op}: logits has an empty vocabulary")
    return N, V


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """(one per row, one for all): the kernel takes either; making a tensor costs as much as a short call."""
    if isinstance(temperature, Tensor):
        return temperature.float().contiguous(), 1.0
    return None, float(temperature)


def logprob(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    *,
    keep_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [N], entropy [N], what the backward needs [N, 2] or nothing)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    N, V = _check_logits("logprob", logits)
    check("logprob", "targets", targets, (N,), torch.int64, logits.device.type)
    if temperatures is not None:
        check("logprob", "temperature", temperatures, (N,), torch.float32, logits.device.type)
    out, entropy = logits.new_empty(N, dtype=torch.float32), logits.new_empty(N, dtype=torch.float32)
    stats = logits.new_empty((N, 2) if keep_stats or triton(logits) else 0, dtype=torch.float32)
    if triton(logits):
        family("softmax").logprob(logits, targets, temperatures, temperature, out, entropy, stats)
        return out, entropy, stats
    bad = lib().logprob(
        logits.data_ptr(),
        targets.data_ptr(),
        0 if temperatures is None else temperatures.data_ptr(),
        temperature,
        out.data_ptr(),
        entropy.data_ptr(),
        stats.data_ptr() if keep_stats else 0,
        N,
        V,
        DTYPES[logits.dtype],
    )
    if bad:
        target, used = (
            int(targets[bad - 1]),
            temperature if temperatures is None else float(temperatures[bad - 1]),
        )
        raise ValueError(
            f"logprob: row {bad - 1} has target {target} and temperature {used}, accepted is 0 to {V - 1} and above 0"
        )
    return out, entropy, stats


Settings = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # temperature, top_k, top_p, min_p, seed, position
Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # token, log-prob, entropy, kept ids and their offsets


def check_settings(op: str, settings: Settings, N: int, device: str) -> Settings:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    for name, x, dtype in zip(names, settings, dtypes, strict=True):
        check(op, name, x, (N,), dtype, device)
    a, b, c, d, e, f = (x.contiguous() for x in settings)
    return a, b, c, d, e, f


def draw(
    op: str, call: Callable[..., int], inputs: list[int], settings: Settings, N: int, *sizes: float
) -> Drawn:
    """Call a sampler of the library: addresses of its inputs and settings, of the outputs, then sizes."""
    token, counts, stash = (torch.empty(N, dtype=torch.int64) for _ in range(3))
    out, entropy = torch.empty(N, dtype=torch.float32), torch.empty(N, dtype=torch.float32)
    bad = call(*inputs, *pointers(*settings, token, out, entropy, counts, stash), N, *sizes)
    if bad:
        names = ("temperature", "top_k", "top_p", "min_p")
        given = ", ".join(f"{name} = {x[bad - 1].item()}" for name, x in zip(names, settings, strict=False))
        raise ValueError(
            f"{op}: row {bad - 1} has {given}; accepted are temperature and top_k from 0, top_p and min_p from 0 to 1"
        )
    offsets = torch.zeros(N + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    kept_ids = torch.empty(int(offsets[-1]), dtype=torch.int32)
    lib().take_kept(*pointers(counts, stash, kept_ids), N)
    return token, out, entropy, kept_ids, offsets


def sample(logits: Tensor, settings: Settings) -> Drawn:
    logits = logits.contiguous()
    N, V = _check_logits("sample", logits)
    settings = check_settings("sample", settings, N, logits.device.type)
    if triton(logits):
        token = logits.new_empty(N, dtype=torch.int64)
        out, entropy = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
        cuts = family("softmax").sample(logits, settings, token, out, entropy).unsqueeze(1)
        kept = (logits > cuts) & (cuts > float("-inf"))
        kept &= ~kept.all(1, keepdim=True)
        return (
            token,
            out,
            entropy,
            kept.nonzero()[:, 1].int(),
            torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)),
        )
    return draw("sample", lib().sample, [logits.data_ptr()], settings, N, V, DTYPES[logits.dtype])


def sample_bounded(
    logits: Tensor, settings: Settings, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """On Triton only; see `ops.sample_bounded`. Launches and allocations alone, nothing that waits."""
    logits = logits.contiguous()
    N, _ = _check_logits("sample_bounded", logits)
    settings = check_settings("sample_bounded", settings, N, logits.device.type)
    token, kept = logits.new_empty(N, dtype=torch.int64), logits.new_empty((N, most), dtype=torch.int32)
    out, entropy = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    sizes = logits.new_empty(N, dtype=torch.int32)
    family("softmax").keep(
        logits, family("softmax").sample(logits, list(settings), token, out, entropy), kept, sizes
    )
    return token, out, entropy, kept, sizes


def grad_logits(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    out: Tensor,
    source: Tensor | None = None,
) -> None:
    """Row i of `out` becomes the gradient of row source[i] (None: i) of the logits, given those of its log-prob and entropy.

    `out` may be the first rows of the logits, if a row that is written is the source of no other. On Triton a negative source leaves
    the row as it is.
    """
    logits, targets, stats = logits.contiguous(), targets.contiguous(), stats.contiguous()
    entropy, grad_logprob, grad_entropy = (
        entropy.contiguous(),
        grad_logprob.contiguous(),
        grad_entropy.contiguous(),
    )
    assert out.is_contiguous()
    if triton(logits):
        rows = (entropy, stats, grad_logprob, grad_entropy)
        family("softmax").logprob_backward(logits, targets, temperatures, temperature, *rows, source, out)
        return
    lib().logprob_backward(
        logits.data_ptr(),
        targets.data_ptr(),
        0 if temperatures is None else temperatures.data_ptr(),
        temperature,
        entropy.data_ptr(),
        stats.data_ptr(),
        grad_logprob.data_ptr(),
        grad_entropy.data_ptr(),
        out.data_ptr(),
        0 if source is None else source.data_ptr(),
        *out.shape,
        DTYPES[logits.dtype],
    )


# ---- torch.library ops -----------------------------------------------------------------------------------------------


@torch.library.custom_op("duologue::logprob", mutates_args=())
def _logprob_op(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return logprob(logits, targets, temperatures, temperature, keep_stats=True)


@_logprob_op.register_fake
def _(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    new = logits.new_empty
    return new(n, dtype=torch.float32), new(n, dtype=torch.float32), new((n, 2), dtype=torch.float32)


@torch.library.custom_op("duologue::logprob_backward", mutates_args=())
def _logprob_backward_op(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_logits(logits, targets, temperatures, temperature, entropy, stats, grad_logprob, grad_entropy, grad)
    return grad


@_logprob_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, temperatures, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, temperatures, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, entropy, stats = ctx.saved_tensors
    grad = _logprob_backward_op(
        logits, targets, temperatures, ctx.temperature, entropy, stats, grad_logprob, grad_entropy
    )
    return grad, None, None, None


_logprob_op.register_autograd(_backward, setup_context=_setup)


def logprob_op(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = _logprob_op(logits, targets, *split_temperature(temperature))
    return out[:2]


def logprob_now(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    return logprob(logits, targets, *split_temperature(temperature))[:2]


@torch.library.custom_op("duologue::sample", mutates_args=())
def sample_op(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Drawn:
    return sample(logits, (temperature, top_k, top_p, min_p, seed, position))


@sample_op.register_fake
def fake_drawn(rows: Tensor, *_: Any) -> Drawn:
    """How many tokens are kept is known only to the kernel."""
    new, n = rows.new_empty, rows.shape[0]
    kept_ids = new(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)
    token, offsets = new(n, dtype=torch.int64), new(n + 1, dtype=torch.int64)
    return token, new(n, dtype=torch.float32), new(n, dtype=torch.float32), kept_ids, offsets
