"""One optimizer update from packed rows, in micro-batches whose split does not change the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from duologue.grpo.packing import Batch, Row, hidden_nodes, pack
from duologue.grpo.shares import micro_batches
from duologue.grpo.world import ALONE, World
from duologue.kernels import gather, ops
from duologue.kernels.policy_loss import LossFn, PolicyLoss
from duologue.model.decoder import Decoder
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class UpdateStats:
    """Sums over the trained tokens of an update, and `mismatch`, the largest |trainer - rollout| log-prob."""

    loss: float = 0.0  # normalised in itself
    entropy: float = 0.0
    clipped: float = 0.0
    kl_old: float = 0.0
    mismatch: float = 0.0
    tokens: int = 0  # that went through the model
    trained_tokens: int = 0

    def note(self, batch: Batch, result: PolicyLoss) -> None:
        """Of a micro-batch."""
        self.loss = float(result.loss.detach())
        self.entropy = float(result.entropy.sum())
        self.tokens = len(batch.token_ids)
        self.trained_tokens = len(result.logprob)

    @classmethod
    def of_all(cls, parts: Sequence[UpdateStats], world: World) -> UpdateStats:
        """Of the micro-batches of all ranks, in an order that is the same for any number of ranks."""
        of_ranks = world.each([dataclasses.asdict(part) for part in parts])  # world
        every = [cls(**values) for of_round in zip(*of_ranks, strict=True) for values in of_round]
        total = cls()
        for part in every:
            for field in dataclasses.fields(cls):
                a, b = getattr(total, field.name), getattr(part, field.name)
                setattr(total, field.name, max(a, b) if field.name == "mismatch" else a + b)
        return total

    def metrics(self) -> dict[str, float]:
        """Means over trained tokens, but for `loss`, `mismatch` and the counts."""
        n = max(self.trained_tokens, 1)
        means = {"entropy": self.entropy / n, "clip_share": self.clipped / n, "kl_old": self.kl_old / n}
        counts = {"tokens": self.tokens, "trained_tokens": self.trained_tokens}
        return {"loss": self.loss, "mismatch": self.mismatch, **means, **counts}


def trained_hidden(model: Decoder, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """Hidden states [N, H] before the batch's trained tokens: the head runs on these positions only."""
    before = gather.Index(batch.nodes[batch.targets - 1], len(batch.first))
    return before.take(hidden_nodes(model, batch, dropout_seed))


def truncated_logprobs(
    model: Decoder, batch: Batch, hidden_NH: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs [N], entropies [N]) of truncated draws, by the distributions that they were drawn from."""
    # Between targets there are none.
    offsets = torch.cat((batch.support_offsets[batch.targets], batch.support_offsets[-1:]))
    return ops.sparse_linear_logprob(
        hidden_NH, model.head_weight, batch.target_ids, batch.support_ids, offsets, temperature
    )


def head_loss(
    model: Decoder, batch: Batch, hidden_NH: Tensor, loss_fn: LossFn, temperature: float, level: str = "token"
) -> PolicyLoss:
    """The loss of the batch's trained tokens, from the hidden states before them."""
    if len(batch.support_ids) == 0:
        return ops.linear_policy_loss(
            hidden_NH,
            model.head_weight,
            batch.target_ids,
            loss_fn,
            level=level,
            temperature=temperature,
            exact=model.exact,
        )
    logp, entropy = truncated_logprobs(model, batch, hidden_NH, temperature)
    loss, sums = loss_fn(logp, entropy, slice(None))
    return PolicyLoss(loss, logp.detach(), entropy.detach(), sums)


def normaliser(rows: Sequence[Row], budget: int = 0, world: World = ALONE) -> Normaliser:
    """Over all rows of the update, whatever micro-batches and ranks they are split into: tokens and rows add
    up, max_length is the largest.

    `budget` is the most tokens that a row can have sampled, dr_grpo's constant; 0 takes the longest row here.
    """
    lengths = [row.n_trained for row in rows]
    tokens, n_rows = world.sum([sum(lengths), sum(n > 0 for n in lengths)])  # world
    longest = budget or world.most(max(lengths, default=0))  # world
    return Normaliser(tokens=float(tokens), rows=float(n_rows), max_length=float(longest))


def packed_loss(
    config: LossConfig, batch: Batch, n_rows: int, total: Normaliser, ref_logp: Tensor | None
) -> LossFn:
    """The policy loss of some of a batch's trained tokens, as the head asks for it."""
    targets = batch.targets
    sampler_logp = batch.behaviour_logprobs[targets]
    advantage = batch.advantages[targets]
    segment_ids = batch.segment_ids[targets]

    def loss_fn(logp: Tensor, entropy: Tensor, rows: slice | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Truncated importance sampling splits new / sampler into new / old, clipped, times old / sampler,
        # capped. On the first update of a rollout the old policy is the present one.
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
    if len(batch.support_ids):
        return truncated_logprobs(model, batch, hidden_NH, temperature)[0]
    return ops.linear_logprob(hidden_NH, model.head_weight, batch.target_ids, temperature, exact=model.exact)[
        0
    ]


def accumulate_policy_gradient(
    model: Decoder,
    rows: Sequence[Row],
    config: LossConfig,
    *,
    temperature: float,
    max_tokens: int,
    reference: Decoder | None = None,
    budget: int = 0,
    after_part: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    dropout_seed: int = 0,
    world: World = ALONE,
    shares: int = 0,
) -> UpdateStats:
    """Add the gradient of the loss over `rows` to the parameters' `.grad`; `after_part` is called after each
    micro-batch.

    Rows whose advantage is exactly 0 count in the normaliser but are not computed, unless a KL or entropy
    term needs them. With many ranks the gradients of their rows add up to that of all rows, whose statistics
    each returns.
    """
    total = normaliser(rows, budget, world)
    needs_all = bool(config.kl_coef or config.entropy_coef)
    active = [row for row in rows if row.teaches or (needs_all and row.n_trained)]
    # These two need the tokens of a row together.
    level = "sequence" if config.variant in ("grpo", "gspo") else "token"
    parts = micro_batches(active, max_tokens, world, shares)
    every = [UpdateStats() for _ in parts]
    for i, (part, stats) in enumerate(zip(parts, every, strict=True)):
        if not part:  # the other ranks have more
            after_part()
            continue
        batch = pack(part, model.head_weight.device)
        ref_logp = None
        if config.kl_coef:
            assert reference is not None
            ref_logp = trained_logprobs(reference, batch, temperature)
        loss_fn = packed_loss(config, batch, len(part), total, ref_logp)
        hidden_NH = trained_hidden(model, batch, dropout_seed + global_part(i, world))
        result = head_loss(model, batch, hidden_NH, loss_fn, temperature, level)
        backward(result.loss)
        after_part()
        stats.note(batch, result)
        stats.clipped = float(result.sums["clipped"])
        stats.kl_old = float(result.sums["kl_old"])
        difference = (result.logprob - batch.behaviour_logprobs[batch.targets]).abs().max()
        stats.mismatch = float(difference)
    return UpdateStats.of_all(every, world)


def global_part(part: int, world: World) -> int:
    """The number of a rank's micro-batch among those of all, so that no two have the same dropout."""
    return part * world.size + world.rank  # world
