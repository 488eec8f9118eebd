"""The policy-gradient losses: pure functions of per-token vectors, each defined here and nowhere else.

All take [N] vectors over the trained tokens of a micro-batch: `logp` (of the policy that is trained, with
gradient), `old_logp` (of the policy that sampled), `advantage`, `segment_ids` (which row a token belongs to,
0 .. n_segments - 1). Nothing is averaged implicitly: the caller passes a `Normaliser` with sums over all
micro-batches and ranks, so the losses of the parts of a batch add up to the loss of the whole, and so do the
gradients.

Variants (ratio r = exp(logp - old_logp), clip bounds 1 - low and 1 + high, advantage A; a loss is minus the
objective):

- grpo    min(r A, clip(r) A), mean over a row's tokens, then over rows (Shao et al. 2024, arXiv 2402.03300)
- dapo    the same terms, divided by the number of trained tokens of the whole step (Yu et al. 2025, arXiv
  2503.14476)
- bnpo    as dapo: TRL's `bnpo` differs only in dividing by each micro-batch's tokens, which changes with the
  split
- dr_grpo the same terms, divided by rows x the largest completion length (Liu et al. 2025, arXiv 2503.20783)
- gspo    r of a row is exp(mean of its log-ratios), for all tokens; then as grpo (Zheng et al. 2025, arXiv
  2507.18071)
- cispo   stop-gradient(min(r, 1 + high)) A logp, divided like dapo (MiniMax 2025, arXiv 2506.13585)

The entropy bonus is the mean over trained tokens whatever the variant, as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from duologue.kernels import gather
from duologue.model.settings import check, setting
from torch import Tensor

VARIANTS = ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised. `dual_clip`, `kl_coef`, `entropy_coef` and `tis_cap` are off at 0."""

    variant: str = setting("dapo", "the policy loss (grpo/loss.py)", one_of=VARIANTS)
    clip_low: float = setting(0.2, "the ratio is clipped to 1 - clip_low ..", least=0, most=1)
    clip_high: float = setting(0.2, ".. and 1 + clip_high", least=0)
    dual_clip: float = setting(
        0.0, "c above 1: with advantage A < 0 a term is bounded by c A (arXiv 1912.09729); 0: off", least=0
    )
    kl_coef: float = setting(0.0, "weight of the KL to the start of self-play", least=0)
    kl_estimator: str = setting("k3", "of that KL (joschu.net/blog/kl-approx.html)", one_of=KL_ESTIMATORS)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", least=0)
    tis_cap: float = setting(
        0.0, "cap of the importance weight between the sampler's and the trainer's log-probs; 0: off", least=0
    )

    def __post_init__(self) -> None:
        check("grpo", self, {"variant": "loss"})
        if self.dual_clip != 0 and self.dual_clip <= 1:
            raise ValueError(f"grpo.dual_clip = {self.dual_clip}: accepted is 0 (off) or a number above 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Normaliser:
    """Of all micro-batches and ranks of one update; 0 where nothing is trained."""

    tokens: float  # trained tokens
    rows: float  # rows that have trained tokens
    max_length: float = 0.0  # the largest completion length, for dr_grpo


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStats:
    """Sums over the tokens given, to be added over micro-batches and divided by the tokens."""

    clipped_low: Tensor
    clipped_high: Tensor
    kl_old: Tensor  # k3 estimate of KL(old || new)


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's samples
    (http://joschu.net/blog/kl-approx.html).

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.exp(-d) - 1 + d


def segment_sum(x: Tensor, segment_ids: Tensor, n_segments: int) -> Tensor:
    return gather.Index(segment_ids, n_segments).sum(x)


def token_weights(
    config: LossConfig, logp: Tensor, segment_ids: Tensor, n_segments: int, total: Normaliser
) -> Tensor:
    """[N] weight of each token's term in the loss, of logp's dtype."""
    ones = torch.ones_like(logp)
    if config.variant in ("dapo", "bnpo", "cispo"):
        return ones / max(total.tokens, 1)
    if config.variant == "dr_grpo":
        return ones / max(total.rows * total.max_length, 1)
    lengths = segment_sum(ones, segment_ids, n_segments)
    return 1.0 / (lengths[segment_ids] * max(total.rows, 1))


def log_ratio(
    config: LossConfig, logp: Tensor, old_logp: Tensor, segment_ids: Tensor, n_segments: int
) -> Tensor:
    """[N] log-ratios; for gspo the row's mean, whose gradient still reaches every token."""
    ratio = logp - old_logp
    if config.variant != "gspo":
        return ratio
    lengths = segment_sum(torch.ones_like(ratio), segment_ids, n_segments)
    return (segment_sum(ratio, segment_ids, n_segments) / lengths.clamp(min=1))[segment_ids]


def policy_loss(
    config: LossConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    segment_ids: Tensor,
    n_segments: int,
    total: Normaliser,
    *,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    sampler_logp: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """(loss, stats) of a micro-batch; see the module's docstring for the variants.

    ref_logp [N] is needed when kl_coef is set, entropy [N] (with gradient) when entropy_coef is. sampler_logp
    [N] holds the log-probs that the rollout recorded when they differ from the trainer's own at the old
    policy (`old_logp`): each term is then weighted by min(exp(old_logp - sampler_logp), tis_cap), a constant.
    """
    log_r = log_ratio(config, logp, old_logp, segment_ids, n_segments)
    ratio = torch.exp(log_r)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.variant == "cispo":
        term = ratio.detach().clamp(max=high) * advantage * logp
    else:
        term = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        if config.dual_clip:
            term = torch.where(advantage < 0, torch.maximum(term, config.dual_clip * advantage), term)
    if config.tis_cap:
        assert sampler_logp is not None, "tis_cap needs sampler_logp"
        term = term * torch.exp(old_logp - sampler_logp).clamp(max=config.tis_cap).detach()
    if config.kl_coef:
        assert ref_logp is not None, "kl_coef needs ref_logp"
        kl = kl_estimate(logp, ref_logp, config.kl_estimator)
        if config.kl_estimator == "k1":
            kl = kl * torch.exp(
                logp - old_logp
            )  # k1 alone has an expected gradient of zero (arXiv 2512.21852)
        term = term - config.kl_coef * kl
    loss = -(token_weights(config, logp, segment_ids, n_segments, total) * term).sum()
    if config.entropy_coef:
        assert entropy is not None, "entropy_coef needs entropy"
        loss = loss - config.entropy_coef * entropy.sum() / max(total.tokens, 1)
    with torch.no_grad():
        stats = LossStats(
            clipped_low=((ratio < low) & (advantage < 0)).sum(),
            clipped_high=((ratio > high) & (advantage > 0)).sum(),
            kl_old=(ratio - 1 - log_r).sum(),
        )
    return loss, stats
