"""How far the policy is from where it started."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from duologue.grpo.loss import kl_estimate
from duologue.grpo.packing import Row, pack
from duologue.grpo.shares import micro_batches
from duologue.grpo.update import trained_logprobs
from duologue.grpo.world import ALONE, World
from duologue.model.decoder import Decoder


@torch.no_grad()
def kl_to_reference(
    reference: Decoder,
    rows: Sequence[Row],
    *,
    temperature: float,
    max_tokens: int,
    world: World = ALONE,
    shares: int = 0,
) -> float:
    """Mean k3 estimate of KL(policy || reference) per sampled token, on the first micro-batch of each share.

    NaN where no dialogue came to a turn of a trained kind.
    """
    parts = micro_batches([row for row in rows if row.n_trained], max_tokens, world, shares)
    sums = []
    for part in parts[: shares // world.size or 1]:
        total, tokens = 0.0, 0
        if part:
            batch = pack(part, reference.head_weight.device)
            ref_logp = trained_logprobs(reference, batch, temperature)
            kl = kl_estimate(batch.behaviour_logprobs[batch.targets], ref_logp, "k3")
            total, tokens = float(kl.sum()), len(kl)
        sums.append((total, tokens))
    every = [pair for of_round in zip(*world.each(sums), strict=True) for pair in of_round]  # world
    total, tokens = sum(total for total, _ in every), sum(tokens for _, tokens in every)
    return float(torch.tensor(total) / tokens) if tokens else math.nan
