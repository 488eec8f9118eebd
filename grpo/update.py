"""One optimizer update from packed rows, in micro-batches whose split does not change the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from duologue.grpo.loss import LossConfig, Normaliser, imitation_loss, kl_estimate, policy_loss
from duologue.grpo.packing import Batch, Row, hidden_nodes, pack, split_rows
from duologue.kernels import ops
from duologue.kernels.policy_loss import LossFn, PolicyLoss
from duologue.model.decoder import Decoder
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class UpdateStats:
    """Means over trained tokens, except `mismatch`, the largest |trainer - rollout| log-prob, and `loss`, a sum by design."""

    loss: float = 0.0
    entropy: float = 0.0
    clip_share: float = 0.0
    kl_old: float = 0.0
    mismatch: float = 0.0
    tokens: int = 0  # that went through the model
    trained_tokens: int = 0


def trained_hidden(model: Decoder, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """Hidden states [N, H] before the batch's trained tokens: the head runs on these positions only."""
    return hidden_nodes(model, batch, dropout_seed).index_select(0, batch.nodes[batch.targets - 1])


def truncated_logprobs(
    model: Decoder, batch: Batch, hidden_NH: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs [N], entropies [N]) of truncated draws, by the distributions that they were drawn from."""
    offsets = torch.cat(
        (batch.kept_offsets[batch.targets], batch.kept_offsets[-1:])
    )  # between targets there are none
    targets = batch.token_ids[batch.targets]
    return ops.sparse_linear_logprob(
        hidden_NH, model.head_weight, targets, batch.kept_ids, offsets, temperature
    )


def head_loss(
    model: Decoder, batch: Batch, hidden_NH: Tensor, loss_fn: LossFn, temperature: float, level: str = "token"
) -> PolicyLoss:
    """The loss of the batch's trained tokens, from the hidden states before them."""
    if len(batch.kept_ids) == 0:
        targets = batch.token_ids[batch.targets]
        return ops.linear_policy_loss(
            hidden_NH,
            model.head_weight,
            targets,
            loss_fn,
            level=level,
            temperature=temperature,
            exact=model.exact,
        )
    logp, entropy = truncated_logprobs(model, batch, hidden_NH, temperature)
    loss, sums = loss_fn(logp, entropy, slice(None))
    return PolicyLoss(loss, logp.detach(), entropy.detach(), sums)


def normaliser(rows: Sequence[Row], budget: int = 0) -> Normaliser:
    """Over all rows of the update, whatever micro-batches they are split into. On several ranks the fields are summed.

    `budget` is the most tokens that a row can have sampled, dr_grpo's constant; 0 takes the longest row here.
    """
    lengths = [row.n_trained for row in rows]
    return Normaliser(
        tokens=float(max(sum(lengths), 1)),
        rows=float(max(sum(n > 0 for n in lengths), 1)),
        max_length=float(budget or max([*lengths, 1])),
    )


def packed_loss(
    config: LossConfig, batch: Batch, n_rows: int, total: Normaliser, ref_logp: Tensor | None
) -> LossFn:
    """The policy loss of some of a batch's trained tokens, as the head asks for it."""
    targets = batch.targets
    sampler_logp, advantage, segment_ids = (
        batch.behaviour_logprobs[targets],
        batch.advantages[targets],
        batch.segment_ids[targets],
    )

    def loss_fn(logp: Tensor, entropy: Tensor, rows: slice | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Truncated importance sampling splits new / sampler into new / old, clipped, times old / sampler, capped. On the
        # first update of a rollout the old policy is the present one.
        loss, parts = policy_loss(
            config,
            logp,
            logp.detach() if config.tis_cap else sampler_logp[rows],
            advantage[rows],
            segment_ids[rows],
            n_rows,
            total,
            ref_logp=None if ref_logp is None else ref_logp[rows],
            entropy=entropy,
            sampler_logp=sampler_logp[rows] if config.tis_cap else None,
        )
        return loss, {"clipped": parts.clipped_low + parts.clipped_high, "kl_old": parts.kl_old}

    return loss_fn


@torch.no_grad()
def trained_logprobs(model: Decoder, batch: Batch, temperature: float) -> Tensor:
    """Log-probs [N] of the batch's trained tokens."""
    hidden_NH = trained_hidden(model, batch)
    if len(batch.kept_ids):
        return truncated_logprobs(model, batch, hidden_NH, temperature)[0]
    return ops.linear_logprob(
        hidden_NH, model.head_weight, batch.token_ids[batch.targets], temperature, exact=model.exact
    )[0]


def accumulate_policy_gradient(
    model: Decoder,
    rows: Sequence[Row],
    config: LossConfig,
    *,
    temperature: float,
    max_tokens: int,
    reference: Decoder | None = None,
    budget: int = 0,
    after_part: Callable[[], None] | None = None,
    dropout_seed: int = 0,
) -> UpdateStats:
    """Add the gradient of the loss over `rows` to the parameters' `.grad`; `after_part` is called after each micro-batch.

    Rows whose advantage is exactly 0 count in the normaliser but are not computed, unless a KL or entropy term needs them.
    """
    total = normaliser(rows, budget)
    device = model.head_weight.device
    needs_all = bool(config.kl_coef or config.entropy_coef)
    active = [row for row in rows if row.n_trained and (needs_all or row.advantage != 0.0)]
    stats = UpdateStats()
    for i, part in enumerate(split_rows(active, max_tokens)):
        batch = pack(part, device)
        ref_logp = None
        if config.kl_coef:
            assert reference is not None
            ref_logp = trained_logprobs(reference, batch, temperature)
        loss_fn = packed_loss(config, batch, len(part), total, ref_logp)
        level = (
            "sequence" if config.variant in ("grpo", "gspo") else "token"
        )  # these need a row's tokens together
        found = head_loss(
            model, batch, trained_hidden(model, batch, dropout_seed + i), loss_fn, temperature, level
        )
        torch.autograd.backward(found.loss)
        if after_part is not None:
            after_part()
        stats.loss += float(found.loss.detach())
        stats.entropy += float(found.entropy.sum())
        stats.clip_share += float(found.sums["clipped"])
        stats.kl_old += float(found.sums["kl_old"])
        stats.mismatch = max(
            stats.mismatch, float((found.logprob - batch.behaviour_logprobs[batch.targets]).abs().max())
        )
        stats.tokens += len(batch.token_ids)
        stats.trained_tokens += len(found.logprob)
    n = max(stats.trained_tokens, 1)
    stats.entropy, stats.clip_share, stats.kl_old = stats.entropy / n, stats.clip_share / n, stats.kl_old / n
    return stats


def accumulate_imitation_gradient(
    model: Decoder, rows: Sequence[Row], *, max_tokens: int, coefficient: float = 1.0, dropout_seed: int = 0
) -> UpdateStats:
    """Add the gradient of the mean negative log-likelihood of the demonstrated tokens, times `coefficient`."""
    total = normaliser(rows)
    stats = UpdateStats()
    for i, part in enumerate(split_rows(rows, max_tokens)):
        batch = pack(part, model.head_weight.device)
        found = head_loss(
            model,
            batch,
            trained_hidden(model, batch, dropout_seed + i),
            lambda logp, *_: (imitation_loss(logp, total.tokens), {}),
            1.0,
        )
        torch.autograd.backward(found.loss * coefficient)
        stats.loss += float(found.loss.detach())
        stats.entropy += float(found.entropy.sum())
        stats.tokens += len(batch.token_ids)
        stats.trained_tokens += len(found.logprob)
    stats.entropy /= max(stats.trained_tokens, 1)
    return stats


@torch.no_grad()
def kl_to_reference(reference: Decoder, rows: Sequence[Row], *, temperature: float, max_tokens: int) -> float:
    """Mean k3 estimate of KL(policy || reference) per sampled token, on the first micro-batch of rows."""
    parts = split_rows([row for row in rows if row.n_trained], max_tokens)
    if not parts:  # no dialogue came to a turn of a trained kind
        return math.nan
    batch = pack(parts[0], reference.head_weight.device)
    ref_logp = trained_logprobs(reference, batch, temperature)
    return float(kl_estimate(batch.behaviour_logprobs[batch.targets], ref_logp, "k3").mean())
