"""One optimizer update from packed rows, in micro-batches whose split does not change the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from duologue.grpo.batch import Batch, Row, hidden_nodes, pack, split_rows
from duologue.grpo.loss import LossConfig, Normaliser, imitation_loss, kl_estimate, policy_loss
from duologue.kernels import ops
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


def trained_logprobs(
    model: Decoder, batch: Batch, temperature: float, dropout_seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, target indices), each [N], of the batch's trained tokens. The head runs on these positions only."""
    targets = batch.targets
    hidden_NH = hidden_nodes(model, batch, dropout_seed).index_select(0, batch.nodes[targets - 1])
    return *head_logprobs(model, batch, hidden_NH, temperature), targets


def head_logprobs(model: Decoder, batch: Batch, hidden_NH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of the trained tokens; a truncated draw is scored by the distribution that it was drawn from."""
    targets = batch.targets
    if len(batch.kept_ids) == 0:
        return ops.logprob(model.head(hidden_NH), batch.token_ids[targets], temperature)
    offsets = torch.cat((batch.kept_offsets[targets], batch.kept_offsets[-1:]))  # between targets there are none
    return ops.sparse_linear_logprob(hidden_NH, model.head_weight, batch.token_ids[targets], batch.kept_ids, offsets, temperature)


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
        logp, entropy, targets = trained_logprobs(model, batch, temperature, dropout_seed + i)
        sampler_logp = batch.behaviour_logprobs[targets]
        # Truncated importance sampling splits new / sampler into new / old, clipped, times old / sampler, capped. On the
        # first update of a rollout the old policy is the present one.
        old_logp = logp.detach() if config.tis_cap else sampler_logp
        ref_logp = None
        if config.kl_coef:
            assert reference is not None
            with torch.no_grad():
                ref_logp = trained_logprobs(reference, batch, temperature)[0]
        loss, parts = policy_loss(
            config, logp, old_logp, batch.advantages[targets], batch.segment_ids[targets], len(part), total,
            ref_logp=ref_logp, entropy=entropy, sampler_logp=sampler_logp if config.tis_cap else None,
        )  # fmt: skip
        torch.autograd.backward(loss)
        if after_part is not None:
            after_part()
        stats.loss += float(loss.detach())
        stats.entropy += float(entropy.detach().sum())
        stats.clip_share += float(parts.clipped_low + parts.clipped_high)
        stats.kl_old += float(parts.kl_old)
        stats.mismatch = max(stats.mismatch, float((logp.detach() - sampler_logp).abs().max()))
        stats.tokens += len(batch.token_ids)
        stats.trained_tokens += len(targets)
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
        logp, entropy, _ = trained_logprobs(model, batch, 1.0, dropout_seed + i)
        loss = imitation_loss(logp, total.tokens)
        torch.autograd.backward(loss * coefficient)
        stats.loss += float(loss.detach())
        stats.entropy += float(entropy.detach().sum())
        stats.tokens += len(batch.token_ids)
        stats.trained_tokens += len(logp)
    stats.entropy /= max(stats.trained_tokens, 1)
    return stats


@torch.no_grad()
def kl_to_reference(reference: Decoder, rows: Sequence[Row], *, temperature: float, max_tokens: int) -> float:
    """Mean k3 estimate of KL(policy || reference) per sampled token, on the first micro-batch of rows."""
    part = split_rows([row for row in rows if row.n_trained], max_tokens)[0]
    batch = pack(part, reference.head_weight.device)
    ref_logp, _, targets = trained_logprobs(reference, batch, temperature)
    return float(kl_estimate(batch.behaviour_logprobs[targets], ref_logp, "k3").mean())
