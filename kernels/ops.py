"""The public ops of duologue: one function per op, usable from any RL code.

    from duologue.kernels import ops
    logprob, entropy = ops.logprob(ops.linear(hidden, head_weight, out_dtype=torch.float32), targets)

Each picks its back end by device and dtype: CPU fp32/bf16 tensors go to the C++ kernels when these are built, CUDA's of fp32/bf16/fp16
to Triton's, all else to `kernels/reference.py`. All accumulate in fp32, all but `write_kv`, `paged_attention`, `group_advantages`
and those that sample are differentiable, and on the first two each row's bits depend on that row alone: not on the batch, the
packing, the pages or the threads. Where an op has `exact`, False lets CUDA use a library that promises less and is faster; on CPU
the kernels are both.

Errors: ValueError names the op, the argument, its value and what is accepted. Values that lie on a GPU are not checked: reading
them would wait for it.

Shapes: T tokens, N rows, K in, O out, Hq/Hk query and key heads, D head dim, V vocabulary, S sequences, P pages, B page size.
"""

from __future__ import annotations

import torch
from duologue.kernels import advantage, attention, autograd, backend, liger, reference, softmax, sparse
from duologue.kernels import head as fused
from torch import Tensor


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the kernel can be called directly: no gradient is asked for and nothing is being traced."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = True,
) -> Tensor:
    """x [..., K] @ weight [O, K]^T + bias [O] -> [..., O], in x's dtype or `out_dtype` (fp32, for logits)."""
    if not backend.takes(x):
        return reference.linear(x, weight, bias, out_dtype)
    if _plain(x, weight, bias):
        return backend.linear(x, weight, bias, out_dtype, exact)
    out: Tensor = autograd.linear(x, weight, bias, out_dtype or x.dtype, exact)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, exact: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019); x [..., K], weight [K]."""
    if not exact and liger.serves(x):
        return liger.rms_norm(x, weight, eps)
    if not backend.takes(x):
        return reference.rms_norm(x, weight, eps)
    if _plain(x, weight):
        return backend.rms_norm(x, None, weight, eps)[0]
    out: Tensor = autograd.rms_norm(x, weight, eps)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., K], weight [K]."""
    if not exact and liger.serves(x):
        return liger.add_rms_norm(x, residual, weight, eps)
    if not backend.takes(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    if _plain(x, residual, weight):
        return backend.rms_norm(x, residual, weight, eps)
    out: tuple[Tensor, Tensor] = autograd.add_rms_norm(x, residual, weight, eps)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021) in the half-rotation layout: q [T, Hq, D], k [T, Hk, D], cos and sin
    [max_position, D/2] fp32, positions [T] int64 -> rotated (q, k)."""
    if not backend.takes(q):
        return reference.rope(q, k, cos, sin, positions)
    if _plain(q, k):
        return backend.rope(q, cos, sin, positions, 1.0), backend.rope(k, cos, sin, positions, 1.0)
    return autograd.rope(q, cos, sin, positions, 1.0), autograd.rope(k, cos, sin, positions, 1.0)


def silu_mul(gate: Tensor, up: Tensor, exact: bool = True) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020); both [..., I]."""
    if not exact and liger.serves(gate):
        return liger.silu_mul(gate, up)
    if not backend.takes(gate):
        return reference.silu_mul(gate, up)
    if _plain(gate, up):
        return backend.silu_mul(gate, up)
    out: Tensor = autograd.silu_mul(gate, up)
    return out


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    exact: bool = True,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal attention within each packed sequence: q [T, Hq, D], k and v [T, Hk, D], cu_seqlens [S + 1] int32 -> [T, Hq, D].

    Hq is a multiple of Hk; consecutive query heads share a key head. Unless `exact`, flash-attn or torch's varlen attention serve
    16-bit CUDA tensors where there is one; `max_seqlen`, the longest sequence, spares them work (T when None).
    """
    if not backend.takes(q):
        return reference.packed_attention(q, k, v, cu_seqlens, scale)
    if not exact and q.is_cuda and (fast := attention.library(q)):
        return fast(q, k, v, cu_seqlens, scale, max_seqlen or len(q))
    if _plain(q, k, v):
        return attention.packed(q, k, v, cu_seqlens, scale)[0]
    out: Tensor = attention.packed_op(q, k, v, cu_seqlens, scale)[0]
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Store k and v [T, Hk, D] at slots [T] int64 (page * B + offset) of k_pages and v_pages [P, B, Hk, D], in place."""
    (backend if backend.takes(k) else reference).write_kv(k, v, k_pages, v_pages, slots)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rope` of q (returned) and k, and `write_kv` of that k and v: one launch on CUDA. Not differentiable."""
    if backend.takes(q):
        return backend.rope_write_kv(q, k, v, cos, sin, positions, k_pages, v_pages, slots)
    q, k = reference.rope(q, k, cos, sin, positions)
    reference.write_kv(k, v, k_pages, v_pages, slots)
    return q


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of new tokens over paged keys: q [T, Hq, D] -> [T, Hq, D].

    Sequence s has the queries cu_seqlens[s] to cu_seqlens[s + 1] ([S + 1] int32); they are the last of its context_lens[s]
    tokens ([S] int32), whose K and V are already in the pages block_table[s] ([S, max_pages] int32). One query is decode, many
    are prefill, and both mix. On the C++ and Triton kernels the bits equal those of `packed_attention` on the same keys.

    Keys that sequences have in common are read once for all of them: on CPU of neighbours whose block tables begin alike; on CUDA
    of the `groups` = (starts [G + 1] int32, shared [G] int32), sequences starts[i] to starts[i + 1] with their first shared[i] keys
    in the same pages, all before their queries. Bits stay the same.
    """
    if not backend.takes(q):
        return reference.paged_attention(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale)
    if torch.compiler.is_compiling():
        out: Tensor = attention.paged_op(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale)
        return out
    return attention.paged(q, k_pages, v_pages, block_table, cu_seqlens, context_lens, scale, groups)


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of targets [N] int64 and entropy (nats) under softmax(logits [N, V] / temperature); both [N] fp32.

    `temperature` is a number, or [N] fp32. Differentiable in the logits.
    """
    if not backend.takes(logits):
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
    exact: bool = True,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprob` of softcap * tanh(linear(hidden [N, H], weight [V, H], bias [V]) / softcap), whose [N, V] is never stored.

    The same (log-prob [N], entropy [N]), fp32, on CPU bit for bit those of `linear` and `logprob`. Differentiable in hidden,
    weight and bias; weight gradients are summed in fp32. Rows where `mask` [N] bool is False are not computed and give 0.
    `chunk_bytes`: bytes for the logits that exist at a time (None: 16 MiB on CPU, 2 GiB on GPU, or what 256 rows need).
    """
    inputs = fused.prepare(
        "linear_logprob", hidden, weight, targets, temperature, bias, softcap, mask, exact, chunk_bytes
    )
    out: tuple[Tensor, Tensor, Tensor] = fused.linear_logprob(*inputs)
    return out[:2]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: fused.LossFn,
    *,
    level: str = "token",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    exact: bool = True,
    chunk_bytes: int | None = None,
) -> fused.PolicyLoss:
    """The loss of the policy whose head this is, in three matrix products; other arguments as in `linear_logprob`.

    `loss_fn(logprob [n], entropy [n], rows) -> loss` or `(loss, {name: tensor})` is called on each chunk; `rows` (a slice or
    int64 indices) picks the chunk's part of any [N] vector. Chunks' losses and named tensors are added up, so a mean must be
    over a constant of the whole. Gradients are taken then and there and returned by the first `backward`, through autograd:
    hooks, DDP and FSDP see an ordinary parameter gradient. Only log-probs and entropies may carry a gradient into loss_fn.

    `level="sequence"` is for a loss that couples tokens of one sequence (gspo): all log-probs first, one call of loss_fn, then
    the logits a second time for rows with a gradient. Skipped when one chunk holds all rows.
    Under torch.compile, without a mask, loss_fn is traced with all rows and differentiated as usual: four products, no break.
    """
    inputs = fused.prepare(
        "linear_policy_loss", hidden, weight, targets, temperature, bias, softcap, mask, exact, chunk_bytes
    )
    out: fused.PolicyLoss = fused.policy_loss(inputs, loss_fn, level)
    return out


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> softmax.Drawn:
    """Draw a token per row of logits [N, V]: (token [N] int64, logprob [N] fp32, entropy [N] fp32, kept_ids int32, kept_offsets
    [N + 1] int64).

    All parameters are [N]: temperature fp32 (0 = greedy, lowest id at ties), top_k int32 (0 = off), top_p fp32 (1 = off), min_p
    fp32 (0 = off), applied in this order; seed and position int64. The draw is argmax(logits / temperature + Gumbel noise), the
    noise a Philox4x32-10 stream of (seed, position, token id): a row's token depends on nothing else.

    kept_ids[kept_offsets[n] : kept_offsets[n + 1]] are the tokens, ascending, that truncation left to row n; none are listed when
    it left all, or the row is greedy. Log-prob and entropy are those of softmax(logits / temperature) (1 when greedy)
    renormalised over that support: what `logprob` gives without truncation, `sparse_linear_logprob` with it, bit for bit.
    """
    settings = (temperature, top_k, top_p, min_p, seed, position)
    if not backend.takes(logits):
        return reference.sample(logits, *settings)
    if torch.compiler.is_compiling():
        out: softmax.Drawn = softmax.sample_op(logits, *settings)
        return out
    return softmax.sample(logits, settings)


def sample_bounded(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sample` in outputs of fixed size, so that a CUDA graph can hold it: (token, logprob, entropy, kept [N, most] int32, n_kept
    [N] int32). Row n kept the ids kept[n, : n_kept[n]]; n_kept is 0 where all tokens were, and above `most` where there was no
    room for them all."""
    settings = (temperature, top_k, top_p, min_p, seed, position)
    if backend.triton(logits):
        return softmax.sample_bounded(logits, settings, most)
    token, logprob, entropy, ids, offsets = sample(logits, *settings)
    kept, sizes = ids.new_zeros((len(logits), most)), offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(logits), device=logits.device), sizes)
    place = torch.arange(len(ids), device=logits.device) - offsets[row]
    fits = place < most
    kept[row[fits], place[fits]] = ids[fits]
    return token, logprob, entropy, kept, sizes.int()


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    exact: bool = True,
) -> Tensor:
    """fp32 logits hidden [N, H] @ weight [V, H]^T + bias [V], with softcap tanh(those / softcap)."""
    logits = linear(hidden, weight, bias, torch.float32, exact)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


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
) -> softmax.Drawn:
    """`sample` of the logits of `head`. On CPU without softcap the bits are those of `linear` and `sample`, and of the logits only
    tiles exist: 64 rows of 512 tokens per thread, or where some row is truncated 64 rows of all tokens.

    `whole` says that no row is truncated: top_k, top_p and min_p are not looked at, and CUDA need not wait for the number of kept
    ids. Then, unless `exact`, no logits are stored there: one pass over the weight, with log-probs that agree up to rounding."""
    settings = (temperature, top_k, top_p, min_p, seed, position)
    sparse.check_head("linear_sample", hidden, weight, bias, softcap)
    if whole and backend.triton(hidden):
        return sparse.linear_sample_whole(hidden, weight, bias, settings, softcap or 0.0, exact)
    if not backend.cpp(hidden) or torch.compiler.is_compiling():
        return sample(head(hidden, weight, bias, softcap, exact), *settings)
    return sparse.linear_sample(hidden, weight, bias, settings, softcap or 0.0)


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
    """Log-prob of targets [N] int64 and entropy under softmax(logits / temperature) renormalised over each row's support.

    The logits are those of `head`. The support of row n is kept_ids[kept_offsets[n] : kept_offsets[n + 1]] (int32, ascending;
    offsets [N + 1] int64), as `sample` returns it; a row without one has all tokens. Only the rows of `weight` that are kept are
    read. `temperature` is a number, or [N] fp32.

    Differentiable in hidden, weight and bias. The weight's gradient is dense: a tied head adds it to the embedding's, and DDP and
    FSDP reduce it like any other. Each of its rows is summed in the order of the batch, so it is the same in every run. On CUDA
    values are not checked: the log-prob of a target outside its support is NaN.
    """
    sparse.check_head("sparse_linear_logprob", hidden, weight, bias, softcap)
    if not (backend.cpp(hidden) or hidden.is_cuda):
        return reference.sparse_linear_logprob(
            hidden, weight, targets, kept_ids, kept_offsets, temperature, bias, softcap
        )
    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(hidden),), float(temperature), device=hidden.device)
    sparse.check_support("sparse_linear_logprob", hidden, targets, kept_ids, kept_offsets, temperature)
    out: tuple[Tensor, ...] = sparse.logprob_op(
        hidden, weight, bias, targets, kept_ids, kept_offsets, temperature, softcap or 0.0
    )
    if hidden.is_cuda and len(
        whole := (kept_offsets.diff() == 0).nonzero()[:, 0]
    ):  # rows that the kernels leave alone
        full = logprob(head(hidden[whole], weight, bias, softcap), targets[whole], temperature[whole])
        out = tuple(x.index_put((whole,), y) for x, y in zip(out, full, strict=False))
    return out[0], out[1]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages of rewards [N] (fp32, or float64) in groups group_ids [N] int64, split by roles [N] int64 when given.

    (advantage [N] fp32, scored members [n_groups, n_roles] int64, whether their rewards are all equal [n_groups, n_roles] bool,
    new baseline). Members that are not scored [N] (bool) count for nothing and have 0, and so has a group whose rewards are equal.

    std: (r - mean) / (std + 1e-4) with the unbiased std; mean: r - mean; leave_one_out: r - mean of the others; running:
    r - baseline[role], baseline [n_roles] float64 with NaN for a role not yet seen, which takes the mean of this batch; the new
    one is decay baseline + (1 - decay) mean. (Otherwise it is empty.) Sums are in double on CPU, in fp32 on CUDA.
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = advantage.advantages_op(
        rewards, group_ids, scored, roles, baseline, method, n_groups, n_roles, decay
    )
    return out
