"""The definition of correct: every op in plain PyTorch, on any device and dtype.

fp32 and bf16 inputs are computed in fp32 and rounded once at the end; float64 inputs stay in float64 (the
oracle of the tests).

Arguments and axes are those of ops.py; some say how to compute, and change nothing here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = True,
) -> Tensor:
    if out_dtype is not None:
        x, weight = x.to(out_dtype), weight.to(out_dtype)
        bias = None if bias is None else bias.to(out_dtype)
    return torch.nn.functional.linear(x, weight, bias)


def softcapped(logits: Tensor, softcap: float | None, out: Tensor | None = None) -> Tensor:
    """softcap * tanh(logits / softcap), into `out` where it is given; the logits themselves without a
    softcap."""
    if not softcap:
        return logits
    return torch.mul(torch.tanh(torch.div(logits, softcap, out=out), out=out), softcap, out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    cos_T1d, sin_T1d = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    first, second = _wide(x_THD).chunk(2, dim=-1)
    rotated = torch.cat((first * cos_T1d - second * sin_T1d, second * cos_T1d + first * sin_T1d), dim=-1)
    return rotated.to(x_THD.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin, positions), rotate(k, cos, sin, positions)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def _attend(q_nHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor:
    """The n queries are the last n of L positions; causal; query heads share key heads in consecutive
    groups."""
    n, heads, _ = q_nHD.shape
    length, groups, _ = k_LGD.shape
    k_HLD = _wide(k_LGD).repeat_interleave(heads // groups, dim=1).transpose(0, 1)
    v_HLD = _wide(v_LGD).repeat_interleave(heads // groups, dim=1).transpose(0, 1)
    scores_HnL = _wide(q_nHD).transpose(0, 1) @ k_HLD.transpose(1, 2) * scale
    query = torch.arange(length - n, length, device=q_nHD.device).unsqueeze(1)
    visible_nL = torch.arange(length, device=q_nHD.device) <= query
    weights = scores_HnL.masked_fill(~visible_nL, float("-inf")).softmax(-1)
    return (weights @ v_HLD).transpose(0, 1).to(q_nHD.dtype)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    bounds = cu_seqlens.tolist()
    parts = [_attend(q[a:b], k[a:b], v[a:b], scale) for a, b in pairwise(bounds) if b > a]
    return torch.cat(parts) if parts else torch.empty_like(q)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k_pages.view(-1, *k_pages.shape[2:])[slots] = k
    v_pages.view(-1, *v_pages.shape[2:])[slots] = v


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    *_: object,
) -> Tensor:
    bounds = cu_seqlens.tolist()
    parts = []
    for s, length in enumerate(context_lens.tolist()):
        pages = block_table[s, : -(-length // k_pages.shape[1])].long()
        k = k_pages[pages].flatten(0, 1)[:length]
        v = v_pages[pages].flatten(0, 1)[:length]
        parts.append(_attend(q[bounds[s] : bounds[s + 1]], k, v, scale))
    return torch.cat(parts) if parts else torch.empty_like(q)


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.device).unsqueeze(-1)
    return _wide(logits) / temperature


LEAST = -1e30  # of a log-prob that is multiplied: what is impossible counts as nothing, not as NaN


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    logp_NV = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    entropy = -(logp_NV.exp() * logp_NV.clamp_min(LEAST)).sum(-1)
    return logp_NV.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def logprob_backward(
    logits: Tensor, targets: Tensor, temperature: Tensor, entropy: Tensor, g: Tensor, h: Tensor
) -> Tensor:
    """The gradient of the logits [N, V], given those of log-prob (g) and entropy (h), both [N]."""
    logp_NV = torch.log_softmax(_scaled(logits, temperature), dim=-1).clamp_min(LEAST)
    g, h, entropy, targets = (x.unsqueeze(-1) for x in (g, h, entropy, targets))
    grad_NV = -logp_NV.exp() * (g + h * (logp_NV + entropy))
    return _scaled(grad_NV.scatter_add_(-1, targets, g), temperature)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, weight, bias, _wide(hidden).dtype)
    return logprob(softcapped(logits, softcap), targets, temperature)


_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit unsigned values held in int64, without overflowing int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b  # both below 2**48
    total_low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total_low >> 32), total_low & _MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words (in int64) per counter; all arguments
    broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """[N, V] fp32 uniforms in (0, 1): key = seed, counter = (token id // 4, 0, position), one word per token
    id.

    All 32 bits count: a token wins by a small uniform, and there fp32 resolves them; 24 bits would cut the
    tail at 6e-8.
    """
    block = torch.arange(-(-vocab_size // 4), device=seed.device)
    seed, position = seed.unsqueeze(1), position.unsqueeze(1)
    zero = torch.zeros_like(block)
    words = philox(
        (block, zero, position & _MASK, (position >> 32) & _MASK), (seed & _MASK, (seed >> 32) & _MASK)
    )
    shape = (len(seed), len(block))
    bits = torch.stack([word.expand(shape) for word in words], dim=-1).flatten(1)[:, :vocab_size]
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def keep_mask(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[N, V] support after top-k, then top-p, then min-p, each on what the one before kept (transformers'
    order).

    A token stays when fewer than k (when less than p of the mass) lie strictly above it: so ties stay or go
    together.
    """
    size = logits.shape[-1]
    ranked = logits.sort(dim=-1, descending=True).values
    kth = torch.where(top_k > 0, top_k, size).clamp(max=size).long() - 1
    least = ranked.gather(-1, kth.unsqueeze(-1))
    probs = ranked.masked_fill(ranked < least, float("-inf")).softmax(-1)
    within = (probs.cumsum(-1) - probs < top_p.unsqueeze(-1)).sum(-1, keepdim=True).clamp(min=1, max=size)
    least = torch.where(top_p.unsqueeze(-1) < 1, torch.maximum(least, ranked.gather(-1, within - 1)), least)
    return (logits >= least) & (logits >= ranked[:, :1] + min_p.unsqueeze(-1).log())


def _renormalised(scaled: Tensor, support: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of softmax over the support [N, V] of scaled logits."""
    logp_NV = scaled.masked_fill(~support, float("-inf")).log_softmax(-1)
    entropy = -(logp_NV.exp() * logp_NV.clamp_min(LEAST)).sum(-1)
    return logp_NV.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    greedy = temperature == 0
    scaled = _scaled(logits, torch.where(greedy, torch.ones_like(temperature), temperature))
    noise = -torch.log(-torch.log1p(-uniforms(seed, position, logits.shape[-1])))
    score = torch.where(greedy.unsqueeze(-1), scaled, scaled + noise)
    support = torch.ones_like(scaled, dtype=torch.bool)
    if bool((top_k > 0).any() | (top_p < 1).any() | (min_p > 0).any()):
        support = keep_mask(scaled, top_k, top_p, min_p) | greedy.unsqueeze(-1)
    token = score.masked_fill(~support, float("-inf")).argmax(-1)
    support |= (support | scaled.isneginf()).all(-1, keepdim=True)
    listed = support & ~support.all(-1, keepdim=True)
    offsets = torch.nn.functional.pad(listed.sum(-1).cumsum(0), (1, 0))
    return token, *_renormalised(scaled, support, token), listed.nonzero()[:, 1].int(), offsets


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
    logits = linear(hidden, weight, bias, _wide(hidden).dtype)
    scaled = _scaled(softcapped(logits, softcap), temperature)
    counts = kept_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    support = (counts == 0).unsqueeze(1).repeat(1, scaled.shape[1])
    support[row, kept_ids.long()] = True
    return _renormalised(scaled, support, targets)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    scored: Tensor,
    roles: Tensor | None,
    baseline: Tensor | None,
    method: str,
    n_groups: int,
    n_roles: int,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in `ops.group_advantages`, without a host sync. Means are taken of the distances from the least:
    equal rewards stay equal."""
    role = torch.zeros_like(group_ids) if roles is None else roles
    group = group_ids * n_roles + role
    zeros = rewards.new_zeros

    def moments(key: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(number, mean, squares about it, whether all are equal) of the scored members of each key."""

        def total(of_member: Tensor) -> Tensor:
            return zeros(size).index_add(0, key, torch.where(scored, of_member, 0.0))

        infinity = torch.full_like(zeros(size), float("inf"))
        least = infinity.scatter_reduce(0, key, rewards.where(scored, float("inf")), "amin")
        largest = (-infinity).scatter_reduce(0, key, rewards.where(scored, float("-inf")), "amax")
        count = total(torch.ones_like(rewards))
        mean = torch.where(count > 0, least, 0.0) + total(rewards - least[key]) / count.clamp(min=1)
        return count, mean, total((rewards - mean[key]).square()), least == largest

    count, mean, square, flat = moments(group, n_groups * n_roles)
    new_baseline = zeros(0, dtype=torch.float64)
    if method == "running":
        assert baseline is not None
        seen, present, _, _ = moments(role, n_roles)
        before = torch.where(baseline.isnan(), present.double(), baseline)
        new_baseline = torch.where(seen > 0, decay * before + (1 - decay) * present, baseline)
        value = rewards - before[role]
    else:
        others = (count - 1).clamp(min=1)
        scale = {
            "std": 1 / ((square / others).sqrt() + 1e-4),
            "mean": torch.ones_like(count),
            "leave_one_out": count / others,
        }[method]
        value = torch.where(flat[group], 0.0, (rewards - mean[group]) * scale[group])
    shape = (n_groups, n_roles)
    return value.where(scored, 0.0).float(), count.long().view(shape), flat.view(shape), new_baseline
