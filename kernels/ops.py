"""The public ops of duologue: one function per op, usable from any RL code.

    from duologue.kernels import ops
    logprob, entropy = ops.logprob(ops.linear(hidden, head_weight, out_dtype=torch.float32), targets)

Each picks its back end by device and dtype: CPU fp32/bf16 tensors go to the C++ kernels when these are built, all else to
`kernels/reference.py`. All accumulate in fp32, all but `write_kv`, `paged_attention` and `sample` are differentiable, and on the
C++ path each row's bits depend on that row alone: not on the batch, the packing, the pages or the threads.

Errors: ValueError names the op, the argument, its value and what is accepted.

Shapes: T tokens, N rows, K in, O out, Hq/Hk query and key heads, D head dim, V vocabulary, S sequences, P pages, B page size.
"""

from __future__ import annotations

import torch
from duologue.kernels import attention, autograd, cpu, head, reference, softmax
from torch import Tensor


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the kernel can be called directly: no gradient is asked for and nothing is being traced."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K] @ weight [O, K]^T + bias [O] -> [..., O], in x's dtype or `out_dtype` (fp32, for logits)."""
    if not cpu.serves(x):
        return reference.linear(x, weight, bias, out_dtype)
    if _plain(x, weight, bias):
        return cpu.linear(x, weight, bias, out_dtype)
    out: Tensor = autograd.linear(x, weight, bias, out_dtype or x.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019); x [..., K], weight [K]."""
    if not cpu.serves(x):
        return reference.rms_norm(x, weight, eps)
    if _plain(x, weight):
        return cpu.rms_norm(x, None, weight, eps)[0]
    out: Tensor = autograd.rms_norm(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., K], weight [K]."""
    if not cpu.serves(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    if _plain(x, residual, weight):
        return cpu.rms_norm(x, residual, weight, eps)
    out: tuple[Tensor, Tensor] = autograd.add_rms_norm(x, residual, weight, eps)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021) in the half-rotation layout: q [T, Hq, D], k [T, Hk, D], cos and sin
    [max_position, D/2] fp32, positions [T] int64 -> rotated (q, k)."""
    if not cpu.serves(q):
        return reference.rope(q, k, cos, sin, positions)
    if _plain(q, k):
        return cpu.rope(q, cos, sin, positions, 1.0), cpu.rope(k, cos, sin, positions, 1.0)
    return autograd.rope(q, cos, sin, positions, 1.0), autograd.rope(k, cos, sin, positions, 1.0)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020); both [..., I]."""
    if not cpu.serves(gate):
        return reference.silu_mul(gate, up)
    if _plain(gate, up):
        return cpu.silu_mul(gate, up)
    out: Tensor = autograd.silu_mul(gate, up)
    return out


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal attention within each packed sequence: q [T, Hq, D], k and v [T, Hk, D], cu_seqlens [S + 1] int32 -> [T, Hq, D].

    Hq is a multiple of Hk; consecutive query heads share a key head.
    """
    if not cpu.serves(q):
        return reference.packed_attention(q, k, v, cu_seqlens, scale)
    if _plain(q, k, v):
        return attention.packed(q, k, v, cu_seqlens, scale)[0]
    out: Tensor = attention.packed_op(q, k, v, cu_seqlens, scale)[0]
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Store k and v [T, Hk, D] at slots [T] int64 (page * B + offset) of k_pages and v_pages [P, B, Hk, D], in place."""
    (cpu if cpu.serves(k) else reference).write_kv(k, v, k_pages, v_pages, slots)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Causal attention of new tokens over paged keys: q [T, Hq, D] -> [T, Hq, D].

    Sequence s has the queries cu_seqlens[s] to cu_seqlens[s + 1] ([S + 1] int32); they are the last of its context_lens[s]
    tokens ([S] int32), whose K and V are already in the pages block_table[s] ([S, max_pages] int32). One query is decode, many
    are prefill, and both mix. On CPU the bits equal those of `packed_attention` on the same keys.
    """
    if not cpu.serves(q):
        return reference.paged_attention(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale)
    run = attention.paged_op if torch.compiler.is_compiling() else attention.paged
    out: Tensor = run(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale)
    return out


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of targets [N] int64 and entropy (nats) under softmax(logits [N, V] / temperature); both [N] fp32.

    `temperature` is a number, or [N] fp32. Differentiable in the logits.
    """
    if not cpu.serves(logits):
        return reference.logprob(logits, targets, temperature)
    run = softmax.logprob_now if _plain(logits) else softmax.logprob_op
    return run(logits, targets, temperature)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    chunk_bytes: int = head.CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`logprob` of the logits hidden [N, H] @ weight [V, H]^T + bias [V], which are never stored whole: (log-prob, entropy), [N] fp32.

    Differentiable in hidden, weight and bias. `softcap` s bends logits to s tanh(logits / s) (Gemma 2). Rows where mask [N] is 0 are
    left out of all products and return 0. `chunk_bytes` bounds the fp32 logits that exist at a time.
    """
    return head.linear_logprob(hidden, weight, targets, temperature, bias, softcap, mask, chunk_bytes)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: head.LossFn,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    level: str = "token",
    chunk_bytes: int = head.CHUNK_BYTES,
) -> Tensor:
    """The sum over chunks of loss_fn(log-probs [n], entropies [n], rows), a scalar; with gradients in hidden, weight and bias.

    The arguments are `linear_logprob`'s. `loss_fn` gets a chunk of rows and their slice of 0 .. N, and returns a scalar; the losses of
    chunks must add up to the whole loss (a normaliser is fixed beforehand). A loss that couples rows, like gspo's sequence ratios,
    needs level="sequence": one call with all rows, after a pass that computes their log-probs (a fourth product).
    Gradients are computed in the forward, so the logits are needed once; rows whose derivative is exactly 0 (masked, clipped, no
    advantage) are left out of the other two products. loss_fn must not rely on gradients of anything but its two arguments.
    """
    return head.linear_policy_loss(
        hidden, weight, targets, loss_fn, temperature=temperature, bias=bias, softcap=softcap, level=level, chunk_bytes=chunk_bytes
    )


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token per row of logits [N, V]: (token [N] int64, logprob [N] fp32, entropy [N] fp32).

    All parameters are [N]: temperature fp32 (0 = greedy, lowest id at ties), top_k int32 (0 = off), top_p fp32 (1 = off), min_p
    fp32 (0 = off), applied in this order; seed and position int64. The draw is argmax(logits / temperature + Gumbel noise), the
    noise a Philox4x32-10 stream of (seed, position, token id): a row's token depends on nothing else. Log-prob and entropy are
    those of `logprob` at the same temperature (1 when greedy), bit for bit, over the full vocabulary.
    """
    if not cpu.serves(logits):
        return reference.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    run = softmax.sample_op if torch.compiler.is_compiling() else softmax.sample
    out: tuple[Tensor, Tensor, Tensor] = run(logits, temperature, top_k, top_p, min_p, seed, position)
    return out
