"""How far a policy's language is from its base's: the KL of both directions, and the perplexity of a text.

Both models go once over the same ids. At each place the KL is that of the two whole distributions over the
vocabulary, not an estimate from the token that stands there. V vocabulary, N places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from duologue.grpo.world import ALONE, World
from duologue.model.decoder import Decoder, PackedAttention
from duologue.model.tokenizer import Tokenizer
from torch import Tensor

PLAIN = Path(__file__).parent / "plain.txt"
WINDOW = 512  # tokens that a place of the text has before it, at most
PLACES = 256  # whose distributions are held at once, [PLACES, V]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Ids, and the places (from 1) whose distributions count: those of the tokens that stand there."""

    token_ids: list[int]  # [T]
    places: list[int]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Means over `tokens` places, in nats; those of the base are None where there is none."""

    tokens: int
    nll: float  # of the tokens by the policy
    base_nll: float | None = None
    kl_base_policy: float | None = None  # KL(base || policy)
    kl_policy_base: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def base_perplexity(self) -> float | None:
        return None if self.base_nll is None else math.exp(self.base_nll)


def passages(tokenizer: Tokenizer, text: str, limit: int) -> list[Passage]:
    """A text cut into windows; the first token of each is not predicted."""
    ids, size = tokenizer.encode(text), min(WINDOW, limit)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [Passage(token_ids=part, places=[*range(1, len(part))]) for part in parts if len(part) > 1]


@torch.no_grad()
def distance(
    policy: Decoder, base: Decoder | None, texts: Sequence[Passage], world: World = ALONE
) -> Distance:
    """Over all places of `texts`, which the ranks share."""
    sums = []
    for numbers in world.hand_out([0.0] * len(texts)):  # world
        sums += [_sums(policy, base, texts[number]) for number in numbers]
    sums = [*world.gather(sums)]  # world
    tokens = sum(len(text.places) for text in texts)
    nll, base_nll, forward, reverse = (
        math.fsum(column) / tokens if tokens else math.nan for column in zip((0.0,) * 4, *sums, strict=True)
    )
    if base is None:
        return Distance(tokens=tokens, nll=nll)
    return Distance(tokens=tokens, nll=nll, base_nll=base_nll, kl_base_policy=forward, kl_policy_base=reverse)


def _sums(policy: Decoder, base: Decoder | None, text: Passage) -> tuple[float, float, float, float]:
    """Of one passage: negative log-probs by policy and base, KL(base || policy), KL(policy || base)."""
    device = policy.head_weight.device
    targets = torch.tensor([text.token_ids[place] for place in text.places], device=device).unsqueeze(1)
    hidden_ours = _hidden(policy, text)
    hidden_theirs = None if base is None else _hidden(base, text)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), PLACES):
        rows = slice(start, start + PLACES)
        p_NV = _logprobs(policy, hidden_ours[rows])
        sums[0] -= p_NV.gather(1, targets[rows]).double().sum().cpu()
        if base is not None and hidden_theirs is not None:
            q_NV = _logprobs(base, hidden_theirs[rows])
            sums[1] -= q_NV.gather(1, targets[rows]).double().sum().cpu()
            sums[2] += (q_NV.exp() * (q_NV - p_NV)).sum(dtype=torch.float64).cpu()
            sums[3] += (p_NV.exp() * (p_NV - q_NV)).sum(dtype=torch.float64).cpu()
    nll, base_nll, forward, reverse = sums.tolist()
    return nll, base_nll, forward, reverse


def _hidden(model: Decoder, text: Passage) -> Tensor:
    """[N, H]: what predicts the token of each place."""
    device, T = model.head_weight.device, len(text.token_ids)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    hidden_TH = model.hidden(
        torch.tensor(text.token_ids, device=device),
        torch.arange(T, device=device),
        PackedAttention(cu_seqlens, model.scale, model.exact),
    )
    return hidden_TH[torch.tensor(text.places, device=device) - 1]


def _logprobs(model: Decoder, hidden_NH: Tensor) -> Tensor:
    """[N, V] fp32."""
    return model.head(hidden_NH).float().log_softmax(-1)
