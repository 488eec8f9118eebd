"""The public ops of duologue: one function per op, usable from any RL code.

    from duologue.kernels import ops
    logprob, entropy = ops.linear_logprob(hidden, head_weight, targets)

Which op when:

    you have                 log-probs, entropies    a draw           the gradient of a loss
    logits [N, V]            logprob                 sample           yours, through logprob
    hidden states, a head    linear_logprob          linear_sample    linear_policy_loss
    ... and a support        sparse_linear_logprob                    yours, through sparse_linear_logprob

Logits take 4 V bytes a row. A support is the set of tokens that top-k, top-p and min-p left to a row.

backend.py says which library serves a tensor: C++, Triton or plain PyTorch (reference.py, the definition of
each op). All accumulate in fp32, or in float64 for float64. All but `write_kv`, `paged_attention`,
`group_advantages` and those that sample are differentiable. On C++ and Triton each row's bits depend on that
row alone: not on the batch, the packing, the pages or the threads. Where an op has `exact`, False lets CUDA
use a library that promises less and is faster; on CPU the kernels are both.

Errors: ValueError names the op, the argument, its value and what is accepted. It is raised for a shape, dtype
or device that does not fit; and on CPU for the values that an op lists under "Values". On a GPU values are
not read, which would wait for it, but by `linear_logprob` and `linear_policy_loss`.

Axes: T tokens, S sequences, N rows, M rows of a product, H hidden, V vocabulary, K in, O out, I
intermediate, Hq and Hk query and key heads, D head dim, P pages, B tokens of a page, W pages of a block
table's row, E ids of all supports, G groups of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from duologue.kernels import advantage, attention, backend, libraries, reference, rows, softmax, sparse
from duologue.kernels import head as fused_head
from duologue.kernels import linear as products
from duologue.kernels.policy_loss import LossFn, PolicyLoss, policy_loss
from torch import Tensor

R = TypeVar("R")


def _form(
    plain: Callable[..., R],
    kernel: Callable[..., R],
    op: Callable[..., Any],
    x: Tensor,
    *inputs: Tensor | None,
) -> Callable[..., R]:
    """The form of an op that serves `x`: its definition; its kernel; or, where a graph is traced or a
    gradient of one of the inputs is wanted, the one with gradients (backend.with_gradients)."""
    if backend.library(x) == "reference":
        return plain
    if torch.compiler.is_compiling():
        return op
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return op
    return kernel


# ---- layers ------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = True,
) -> Tensor:
    """x [..., K] @ weight [O, K]^T + bias [O] -> [..., O], in x's dtype or `out_dtype` (fp32, for logits)."""
    run = _form(reference.linear, products.forward, products.forward_grad, x, x, weight, bias)
    return run(x, weight, bias, out_dtype, exact)


def rms_norm(x: Tensor, weight: Tensor, eps: float, exact: bool = True) -> Tensor:
    """x [..., K] / sqrt(mean(x^2) + eps) * weight [K], the mean over K (Zhang and Sennrich 2019)."""
    if libraries.liger(x, exact):
        return libraries.rms_norm(x, weight, eps)
    return _form(reference.rms_norm, rows.rms_norm, rows.rms_norm_grad, x, x, weight)(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., K], weight [K]."""
    inputs = (x, residual, weight)
    if libraries.liger(x, exact):
        return libraries.add_rms_norm(*inputs, eps)
    return _form(reference.add_rms_norm, rows.add_rms_norm, rows.add_rms_norm_grad, x, *inputs)(*inputs, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021) in the half-rotation layout: q [T, Hq, D], k [T, Hk, D], cos and sin
    [max_position, D/2] fp32, positions [T] int64 -> rotated (q, k). Values: positions within the tables.
    """
    run = _form(reference.rope, rows.rope, rows.rope_grad, q, q, k)
    return run(q, k, cos, sin, positions)


def silu_mul(gate: Tensor, up: Tensor, exact: bool = True) -> Tensor:
    """gate * sigmoid(gate) * up (SwiGLU, Shazeer 2020); both [..., I]."""
    if libraries.liger(gate, exact):
        return libraries.silu_mul(gate, up)
    return _form(reference.silu_mul, rows.silu_mul, rows.silu_mul_grad, gate, gate, up)(gate, up)


# ---- attention ---------------------------------------------------------------------------------------------


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    exact: bool = True,
    max_seqlen: int | None = None,
    library_backward: bool = False,
) -> Tensor:
    """Causal attention within each packed sequence, softmax(q k^T * scale) v: q [T, Hq, D],
    k and v [T, Hk, D], cu_seqlens [S + 1] int32 -> [T, Hq, D].

    Hq is a multiple of Hk; consecutive query heads share a key head. Of 16-bit CUDA tensors flash-attn or
    torch's own attention take all unless `exact`, and the backward alone with `library_backward`.
    `max_seqlen`, the longest sequence, spares them work (T when None). Values: cu_seqlens rise from 0 to T.
    """
    if fast := libraries.attention(q, exact):
        return fast(q, k, v, cu_seqlens, scale, max_seqlen or len(q))
    run = _form(reference.packed_attention, attention.packed, attention.packed_grad, q, q, k, v)
    longest = (max_seqlen or len(q),) if library_backward and run is attention.packed_grad else ()
    return run(q, k, v, cu_seqlens, scale, *longest)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Store k and v [T, Hk, D] in place, in k_pages and v_pages [P, B, Hk, D] at slots [T] int64.

    Values: slots (page * B + offset) from 0 to P * B - 1.
    """
    _form(reference.write_kv, rows.write_kv, rows.write_kv, k)(k, v, k_pages, v_pages, slots)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    groups: attention.Groups | None = None,
    work: attention.Work | None = None,
) -> Tensor:
    """Causal attention over paged keys: q [T, Hq, D], k_pages and v_pages [P, B, Hk, D] -> [T, Hq, D].

    Sequence s has the queries cu_seqlens[s] to cu_seqlens[s + 1] ([S + 1] int32); they are the last of its
    context_lens[s] tokens ([S] int32), whose K and V are already in the pages block_table[s] ([S, W] int32).
    One query is decode, many are prefill, and both mix. On C++ and Triton the bits equal those of
    `packed_attention` on the same keys.

    Keys in common are read once: on CPU by neighbours whose block tables begin alike; on CUDA, where each
    sequence has one query, by the `groups` = (starts [G + 1] int32, shared [G] int32), sequences starts[i] to
    starts[i + 1] with their first shared[i] keys in the same pages, all before their queries. `work` is what
    attention.decode_work makes of lengths and groups, once for many layers. Bits stay the same.

    Values: cu_seqlens rise from 0 to T; a sequence has as many tokens as queries or more, and pages for them.
    """
    run = _form(reference.paged_attention, attention.paged, attention.paged_traced, q)
    return run(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale, groups, work)


# ---- logits in hand ----------------------------------------------------------------------------------------


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """(log-prob of targets [N] int64, entropy in nats) under softmax(logits [N, V] / temperature), [N] fp32.

    `temperature` is a number, or [N] fp32. Differentiable in the logits.

    Values: targets from 0 to V - 1, temperatures above 0.
    """
    run = _form(reference.logprob, softmax.logprob, softmax.logprob_traced, logits, logits)
    return run(logits, targets, temperature)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> softmax.Samples:
    """Draw a token per row of logits [N, V]: (token [N] int64, logprob [N] fp32, entropy [N] fp32, kept_ids
    [E] int32, kept_offsets [N + 1] int64).

    All parameters are [N]: temperature fp32 (0 = greedy, lowest id at ties), top_k int32 (0 = off), top_p
    fp32 (1 = off), min_p fp32 (0 = off), applied in this order; seed and position int64. The draw is
    argmax(logits / temperature + Gumbel noise), the noise a Philox4x32-10 stream of (seed, position, token
    id): a row's token depends on nothing else.

    kept_ids[kept_offsets[n] : kept_offsets[n + 1]] are the tokens, ascending, that truncation left to row n:
    its support. None are listed when it left all, or the row is greedy. Log-prob and entropy are those of
    softmax(logits / temperature) (1 when greedy) renormalised over that support: what `logprob` gives without
    truncation, `sparse_linear_logprob` with it, bit for bit.

    Values: temperature and top_k from 0, top_p and min_p from 0 to 1.
    """
    settings = (temperature, top_k, top_p, min_p, seed, position)
    return _form(reference.sample, softmax.sample, softmax.sample_op, logits)(logits, *settings)


def sample_bounded(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    most: int,
) -> softmax.Samples:
    """`sample` for a CUDA graph: (token, logprob, entropy, support [N, most] int32, sizes [N] int32).

    Row n has support[n, : sizes[n]]; sizes[n] is 0 for all tokens, above `most` where they do not fit.
    """
    settings = (temperature, top_k, top_p, min_p, seed, position)
    if backend.triton(logits):
        return softmax.sample_bounded(logits, settings, most)
    return softmax.bounded(sample(logits, *settings), most)


# ---- hidden states and a head ------------------------------------------------------------------------------


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    exact: bool = True,
) -> Tensor:
    """z = hidden [N, H] @ weight [V, H]^T + bias [V], fp32 or float64; or softcap * tanh(z / softcap)."""
    return reference.softcapped(linear(hidden, weight, bias, fused_head.wide(hidden), exact), softcap)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    exact: bool = True,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprob` of the logits of `head`, which are never stored as a whole.

    The same (log-prob [N], entropy [N]), fp32, on CPU bit for bit. Differentiable in hidden, weight and bias;
    weight gradients are summed in fp32. Rows where `mask` [N] bool is False are not computed and give 0.
    `chunk_bytes`: bytes for the logits that exist at a time (None: 16 MiB on CPU, on a GPU what
    `head.gpu_bytes` says of its memory, or 256 rows).

    Values: targets from 0 to V - 1 and finite temperatures above 0, where the mask is True.
    """
    inputs = fused_head.prepare(
        "linear_logprob", hidden, weight, targets, temperature, bias, softcap, mask, exact, chunk_bytes
    )
    out: tuple[Tensor, Tensor, Tensor] = fused_head.linear_logprob_grad(*inputs)
    return out[:2]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    level: str = "token",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    exact: bool = True,
    chunk_bytes: int | None = None,
) -> PolicyLoss:
    """The loss of a policy in three matrix products; other arguments and errors as in `linear_logprob`.

    `loss_fn(logprob [n], entropy [n], rows) -> loss` or `(loss, {name: tensor})` is called on each chunk;
    `rows` (a slice or int64 indices) picks the chunk's part of any [N] vector. Chunks' losses and named
    tensors are added up, so a mean must be over a constant of the whole. Gradients are taken then and there
    and returned by the first `backward`, through autograd: hooks, DDP and FSDP see an ordinary parameter
    gradient. Only log-probs and entropies may carry a gradient into loss_fn.

    `level="sequence"` is for a loss that couples tokens of one sequence (gspo): all log-probs first, one call
    of loss_fn, then the logits a second time for rows with a gradient. Skipped when one chunk holds all rows.
    Under torch.compile, without a mask, loss_fn is traced too, with all rows: four products, no break.
    """
    inputs = fused_head.prepare(
        "linear_policy_loss", hidden, weight, targets, temperature, bias, softcap, mask, exact, chunk_bytes
    )
    return policy_loss(inputs, loss_fn, level)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    exact: bool = True,
    whole: bool = False,
) -> softmax.Samples:
    """`sample` of the logits of `head`. On CPU without softcap the bits are those of `linear` and `sample`,
    and of the logits only tiles exist: per thread 64 rows of 512 tokens, or of all where one is truncated.

    `whole` says that no row is truncated: top_k, top_p and min_p are not read, and CUDA need not wait for the
    sizes of the supports. Then, unless `exact`, no logits are stored there: one pass over the weight, with
    log-probs that agree up to rounding. Values as in `sample`.
    """
    settings = (temperature, top_k, top_p, min_p, seed, position)
    sparse.check_head("linear_sample", hidden, weight, bias, softcap)
    if whole and backend.triton(hidden):
        return sparse.linear_sample_whole(hidden, weight, bias, settings, softcap or 0.0, exact)
    if backend.cpp(hidden) and not torch.compiler.is_compiling():
        return sparse.linear_sample(hidden, weight, bias, settings, softcap or 0.0)
    return sample(head(hidden, weight, bias, softcap, exact), *settings)


def sparse_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-prob of targets [N] int64, entropy) under softmax(logits of `head` / temperature) renormalised
    over each row's support; both [N] fp32. `temperature` is a number, or [N] fp32.

    The support of row n is kept_ids[kept_offsets[n] : kept_offsets[n + 1]] ([E] int32, ascending; [N + 1]
    int64), as `sample` returns it; a row without one has all tokens. Other rows of `weight` are not read.

    Differentiable in hidden, weight and bias. The weight's gradient is dense: a tied head adds it to the
    embedding's, and DDP and FSDP reduce it like any other. Each of its rows is summed in the order of the
    batch, so it is the same in every run.

    Values: ids and targets from 0 to V - 1, a target in its support, offsets rising from 0 to E, temperatures
    above 0. On Triton the log-prob of a target outside its support is NaN.
    """
    sparse.check_head("sparse_linear_logprob", hidden, weight, bias, softcap)
    run = _form(reference.sparse_linear_logprob, sparse.logprob, sparse.logprob, hidden)
    return run(hidden, weight, targets, kept_ids, kept_offsets, temperature, bias, softcap)


# ---- rewards -----------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    *,
    method: str,
    n_groups: int,
    roles: Tensor | None = None,
    n_roles: int = 1,
    baseline: Tensor | None = None,
    decay: float = 0.95,
) -> advantage.Advantages:
    """Advantages of rewards [N] (fp32 or float64) in groups group_ids [N] int64, split by roles [N] int64.

    (advantage [N] fp32, scored members [n_groups, n_roles] int64, whether their rewards are all equal
    [n_groups, n_roles] bool, new baseline). Members that are not scored [N] (bool) count for nothing and have
    0, and so has a group whose rewards are equal.

    std: (r - mean) / (std + 1e-4) with the unbiased std; mean: r - mean; leave_one_out: r - mean of the
    others; running: r - baseline[role], baseline [n_roles] float64 with NaN for a role not yet seen, which
    takes the mean of this batch; the new one is decay baseline + (1 - decay) mean (empty for the others).

    Values: group_ids from 0 to n_groups - 1, roles from 0 to n_roles - 1.
    """
    members = (rewards, group_ids, scored, roles, baseline)
    advantage.check(*members, method, n_roles)
    kernel: Any = advantage.kernel_op if torch.compiler.is_compiling() else advantage.kernel
    run = kernel if backend.cpp(rewards) else reference.group_advantages
    return run(*members, method, n_groups, n_roles, decay)
