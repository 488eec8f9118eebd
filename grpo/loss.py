"""The policy loss of GRPO and its relatives, as pure functions of per-token vectors.

Every vector is `[N]`, one entry per trained token of one micro-batch: nothing is padded, nothing is masked here. A
sequence is one packed row. What a loss divides by is an explicit `Normaliser` of the whole batch (all micro-batches,
all ranks), so the losses of the micro-batches, and their gradients, sum to those of the whole however it is split.

    r_t = exp(logp_t - old_logp_t)    A = advantage    |o_i| = trained tokens of sequence i    sg = stop gradient

    variant  term of token t                             sum over tokens divided by  paper (arXiv)
    grpo     -min(r A, clip(r, 1 - low, 1 + high) A)     sequences * |o_i|           2402.03300
    dr_grpo  same                                        sequences * max_length      2503.20783
    dapo     same                                        tokens                      2503.14476
    bnpo     same                                        tokens                      (TRL's name)
    gspo     same, r replaced by exp(mean_t log r_t)     sequences * |o_i|           2507.18071
    cispo    -sg(clip(r, 1 - low, 1 + high)) A logp      tokens                      2506.13585

TRL's `bnpo` divides by the tokens of each micro-batch; with a global normaliser its difference to `dapo` is gone, on
purpose. CISPO's paper leaves the lower side open: `clip_low = 1`.

The surrogate alone is multiplied by the truncated importance weight `sg(min(exp(old_logp - behaviour_logp), tis_cap))`
(https://fengyao.notion.site/off-policy-rl). `kl_coef * KL(policy, reference)` is added to a token's term before the
division. `entropy_coef` times the mean entropy over tokens is subtracted from the loss, whatever the variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VARIANTS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")
STATS = ("clip_low", "clip_high", "ratio", "approx_kl", "entropy", "kl_ref", "mismatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What to minimise. Clip bounds are distances from 1: the ratio is kept in [1 - clip_low, 1 + clip_high].

    `dual_clip` (1912.09729; 0 = off) bounds the ratio of tokens with a negative advantage; it must exceed
    1 + clip_high, and CISPO has no use for it. `tis_cap` 0 = no truncated importance sampling.
    """

    variant: str = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    tis_cap: float = 0.0

    def __post_init__(self) -> None:
        dual_ok = self.dual_clip == 0 or (self.dual_clip > 1 + self.clip_high and self.variant != "cispo")
        checks = (
            ("variant", f"one of {', '.join(VARIANTS)}", self.variant in VARIANTS),
            ("kl_estimator", f"one of {', '.join(KL_ESTIMATORS)}", self.kl_estimator in KL_ESTIMATORS),
            ("clip_low", "a number in (0, 1]", 0 < self.clip_low <= 1),
            ("clip_high", "a number > 0", self.clip_high > 0),
            ("dual_clip", "0 (off), or a number > 1 + clip_high for a variant other than cispo", dual_ok),
            ("kl_coef", "a number >= 0", self.kl_coef >= 0),
            ("tis_cap", "0 (off) or a number >= 1", self.tis_cap == 0 or self.tis_cap >= 1),
        )
        for name, accepted, ok in checks:
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: accepted is {accepted}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Normaliser:
    """What the loss divides by: sums over the whole batch, not over the micro-batch at hand."""

    tokens: float  # trained tokens
    sequences: float  # sequences that have a trained token
    max_length: float  # the most tokens that a sequence could have had trained; dr_grpo only

    @classmethod
    def of(cls, lengths: Tensor, max_length: float) -> Normaliser:
        """From the trained tokens of each sequence of the batch `[S]`. Over ranks, add up `tokens` and `sequences`."""
        return cls(tokens=float(lengths.sum()), sequences=float((lengths > 0).sum()), max_length=max_length)


@dataclass(frozen=True, slots=True)
class LossStats:
    """Sums over tokens of `STATS`, and the number of tokens last: add up micro-batches (and ranks), then take means.

    ratio: r, or the sequence's for gspo. approx_kl: k3 of the old policy to this one. kl_ref: the KL term. mismatch:
    |old_logp - behaviour_logp|, or |logp - old_logp| where the behaviour's are the old ones: at the first update on a
    rollout that is by how much rollout and trainer disagree.
    """

    sums: Tensor  # [len(STATS) + 1] float64

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(self.sums + other.sums)

    def means(self) -> dict[str, float]:
        """The mean of each over tokens (0 without tokens). Waits for the device."""
        *sums, tokens = self.sums.tolist()
        return {name: value / max(tokens, 1.0) for name, value in zip(STATS, sums, strict=True)}


def policy_loss(
    config: LossConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    segment_ids: Tensor,
    lengths: Tensor,
    normaliser: Normaliser,
    *,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    behaviour_logp: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """Loss of one micro-batch (a scalar whose sum over micro-batches is the loss of the batch) and its statistics.

    logp, old_logp, advantage: [N], one floating dtype. `old_logp` is what the ratio divides by: the behaviour's own
    log-probs where rollout and training agree, else those of the trainer's forward at the old weights, and then
    `behaviour_logp` [N] is given too. segment_ids [N] int64: the sequence of each token; lengths [S]: the number of
    trained tokens of each sequence, wherever they are; gspo needs whole sequences. `ref_logp` is needed if kl_coef > 0,
    `entropy` (differentiable) if entropy_coef != 0, `behaviour_logp` if tis_cap > 0.
    """
    log_ratio = logp - old_logp
    if config.variant == "gspo":
        log_ratio = sequence_mean(log_ratio, segment_ids, lengths)
    ratio = log_ratio.exp()
    term = surrogate(config, ratio, logp, advantage)
    if config.tis_cap > 0:
        assert behaviour_logp is not None, "tis_cap > 0 needs behaviour_logp"
        term = term * (old_logp - behaviour_logp).exp().clamp(max=config.tis_cap).detach()
    kl = None
    if config.kl_coef > 0:
        assert ref_logp is not None, "kl_coef > 0 needs ref_logp"
        kl = reference_kl(config.kl_estimator, logp, old_logp, ref_logp)
        term = term + config.kl_coef * kl
    loss = (term / divisor(config.variant, segment_ids, lengths, normaliser)).sum()
    if config.entropy_coef != 0:
        assert entropy is not None, "entropy_coef != 0 needs entropy"
        loss = loss - config.entropy_coef * entropy.sum() / max(normaliser.tokens, 1.0)
    return loss, _stats(config, logp, old_logp, advantage, ratio, entropy, kl, behaviour_logp)


def surrogate(config: LossConfig, ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """The term of each token [N] before KL and normalisation; `ratio` is of the token or, for gspo, of its sequence."""
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.variant == "cispo":
        return -clipped.detach() * advantage * logp
    if config.dual_clip > 0:
        ratio = ratio.clamp(max=config.dual_clip)  # where A > 0 the minimum takes `clipped`, so this bounds A < 0 only
    return -torch.minimum(ratio * advantage, clipped * advantage)


def reference_kl(estimator: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy || reference) of each token [N] from one sample (http://joschu.net/blog/kl-approx.html).

    With d = logp - ref_logp, k3 is exp(-d) - 1 + d, as in TRL; k2 is d^2 / 2, whose expected gradient on-policy is that
    of the KL; k1 is r d, as d alone has an expected gradient of zero (2512.21852): on-policy it is d, with the KL's
    gradient.
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return (logp - old_logp).exp() * difference
    if estimator == "k2":
        return difference.square() / 2
    return (-difference).exp() - 1 + difference


def sequence_mean(values: Tensor, segment_ids: Tensor, lengths: Tensor) -> Tensor:
    """Mean of `values` [N] over each sequence, given back to each of its tokens [N]."""
    sums = values.new_zeros(lengths.shape[0]).index_add(0, segment_ids, values)
    return (sums / lengths.clamp(min=1))[segment_ids]


def divisor(variant: str, segment_ids: Tensor, lengths: Tensor, normaliser: Normaliser) -> Tensor | float:
    """What each token's term is divided by: [N] or a number."""
    if variant in ("dapo", "bnpo", "cispo"):
        return max(normaliser.tokens, 1.0)
    if variant == "dr_grpo":
        return max(normaliser.sequences, 1.0) * normaliser.max_length
    return max(normaliser.sequences, 1.0) * lengths[segment_ids]


@torch.no_grad()
def _stats(
    config: LossConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    ratio: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    behaviour_logp: Tensor | None,
) -> LossStats:
    shift = old_logp - logp
    zero = torch.zeros_like(logp)
    values = {
        "clip_low": (ratio < 1 - config.clip_low) & (advantage < 0),
        "clip_high": (ratio > 1 + config.clip_high) & (advantage > 0),
        "ratio": ratio,
        "approx_kl": shift.exp() - 1 - shift,
        "entropy": zero if entropy is None else entropy,
        "kl_ref": zero if kl is None else kl,
        "mismatch": (shift if behaviour_logp is None else old_logp - behaviour_logp).abs(),
    }
    sums = [values[name].detach().sum(dtype=torch.float64) for name in STATS]
    return LossStats(torch.stack([*sums, zero.new_tensor(float(zero.numel()), dtype=torch.float64)]))
