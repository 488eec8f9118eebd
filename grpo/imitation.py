"""Imitation: rows of scripted dialogues, and the gradient of their negative log-likelihood."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from duologue.grpo.packing import Row, pack
from duologue.grpo.rows import view_row
from duologue.grpo.shares import micro_batches
from duologue.grpo.update import UpdateStats, global_part, head_loss, trained_hidden
from duologue.grpo.world import ALONE, World
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.selfplay.dialogue import KINDS, Transcript, Turn
from torch import Tensor


def demonstration_rows(
    dialogue: ScriptedDialogue,
    tokenizer: Tokenizer,
    dialogue_id: int,
    final_weight: float = 1.0,
    decisive_weight: float = 1.0,
    limit: int | None = None,
) -> list[Row]:
    """Both sides' views of a scripted dialogue, by the same transcript that self-play uses; each side
    imitates its own words. A token of a final statement counts `final_weight` times in the loss, one of a
    decisive word `decisive_weight` times. The first turn that makes a view longer than `limit` ids ends it.
    """
    first, second = dialogue.scenario.private_text
    transcript = Transcript(tokenizer.chat, (tokenizer.encode(first), tokenizer.encode(second)))
    end = tokenizer.chat.end_token_id
    question = tokenizer.encode(dialogue.final_prompt)
    lengths = [len(view.token_ids) for view in transcript.views]  # of whole turns
    deciding: tuple[list[int], list[int]] = ([], [])  # positions in each side's view
    spans = dialogue.decisive or [[] for _ in dialogue.turns]
    for (side, text, kind), decisive in zip(dialogue.turns, spans, strict=True):
        if kind == "prompt":
            told = Turn(role=side, kind=kind, text=text, token_ids=tokenizer.encode(text), logprobs=None)
            transcript.tell(told)
            continue
        transcript.ask(side, question if kind == "final" else None)
        said, offsets = tokenizer.encode_with_offsets(text)
        before, ids = len(transcript.views[side].token_ids), [*said, end]
        if decisive:
            deciding[side].extend(before + i for i, at in enumerate(offsets) if _overlaps(at, decisive))
        turn = Turn(role=side, kind=kind, text=text, token_ids=ids, logprobs=None)
        transcript.say(turn, heard=not dialogue.observed)
        longer = [len(view.token_ids) for view in transcript.views]
        if limit is not None and max(longer) > limit:
            break
        lengths = longer
    for view, length in zip(transcript.views, lengths, strict=True):
        view.cut(length)
    kinds = ("utterance", "final")
    rows = [view_row(view, kinds, 0.0, dialogue_id, role) for role, view in enumerate(transcript.views)]
    if final_weight != 1 or decisive_weight != 1:
        final = KINDS.index("final")
        for row, view, places in zip(rows, transcript.views, deciding, strict=True):
            row.weights = [final_weight if kind == final else 1.0 for kind in view.kinds]
            for i in places:
                if i < len(row.weights):
                    row.weights[i] = decisive_weight
    return rows


def _overlaps(one: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(one[0] < end and start < one[1] for start, end in others)


def demonstration_batch(
    corpus: list[ScriptedDialogue],
    tokenizer: Tokenizer,
    n: int,
    seed: int,
    final_weight: float = 1.0,
    decisive_weight: float = 1.0,
    limit: int | None = None,
) -> list[Row]:
    """Rows of `n` dialogues drawn from the corpus by `seed`, each of at most `limit` ids."""
    chosen = random.Random(seed).sample(range(len(corpus)), min(n, len(corpus)))
    how = final_weight, decisive_weight, limit
    rows = [row for i in chosen for row in demonstration_rows(corpus[i], tokenizer, i, *how)]
    return [row for row in rows if row.n_trained]


def imitation_loss(logp: Tensor, total: float, weights: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of demonstrated tokens [N] by their weights [N], by default 1 each; `total` is
    the sum of the weights of the whole step.
    """
    return -(logp if weights is None else logp * weights).sum() / max(total, 1)


def accumulate_imitation_gradient(
    model: Decoder,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    coefficient: float = 1.0,
    after_part: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    dropout_seed: int = 0,
    world: World = ALONE,
    shares: int = 0,
    total: float = 0.0,
) -> UpdateStats:
    """Add the gradient of the mean negative log-likelihood of the demonstrated tokens, by their weights,
    times `coefficient`;
    `after_part` is called after each micro-batch. `total` is the sum of these weights over all ranks, 0 where
    it is to be made here.
    """
    total = total or world.sum([imitated(rows)])[0]  # world
    parts = micro_batches(rows, max_tokens, world, shares)
    every = [UpdateStats() for _ in parts]
    for i, (part, stats) in enumerate(zip(parts, every, strict=True)):
        if not part:
            after_part()
            continue
        batch = pack(part, model.head_weight.device)
        weights = None if batch.weights is None else batch.weights[batch.targets]

        def loss_fn(logp: Tensor, _: Tensor, rows: slice | Tensor, w: Tensor | None = weights) -> Any:
            return imitation_loss(logp, total, None if w is None else w[rows]), {}

        hidden_NH = trained_hidden(model, batch, dropout_seed + global_part(i, world))
        result = head_loss(model, batch, hidden_NH, loss_fn, 1.0)
        backward(result.loss * coefficient)
        after_part()
        stats.note(batch, result)
    return UpdateStats.of_all(every, world)


def imitated(rows: Sequence[Row]) -> float:
    """The sum of the weights of trained tokens."""
    return sum(map(_of_row, rows))


def _of_row(row: Row) -> float:
    if row.weights is None:
        return float(row.n_trained)
    return sum(w for w, trained in zip(row.weights, row.loss_mask, strict=True) if trained)
