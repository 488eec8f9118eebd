"""Self-play on the engine: who hears what, what is trained, and that the whole is a function of its seed."""

from __future__ import annotations

import random

import pytest
import torch
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import GrpoSection
from duologue.grpo.imitation import demonstration_rows
from duologue.grpo.packing import pack
from duologue.grpo.rows import grpo_rows
from duologue.kernels import backend
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.catalogue import corpus
from duologue.rollout.games.deal import DealGame
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import FINAL, PROMPT, UTTERANCE, Group
from duologue.rollout.selfplay.rules import Rules

GAME = DealGame()
SCRIPTS = corpus(GAME, 400, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for d in SCRIPTS for _, text, _ in d.turns], 400)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    decoder = Decoder(
        ModelConfig(
            model_type="llama",
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=400,
        )
    )
    decoder.init_weights(0)
    with torch.no_grad():  # a bias towards short turns and a close now and then
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return decoder


def play(
    model: Decoder, tokenizer: Tokenizer, *, seed: int = 0, cache_tokens: int = 65_536, max_batch: int = 64
) -> list[Group]:
    engine = Engine(model, cache_tokens=cache_tokens, max_batch=max_batch)
    arena = Arena(engine, tokenizer, GAME, Rules(max_rounds=2, max_tokens_per_turn=8, max_tokens_final=6))
    rng = random.Random(7)
    groups = arena.play([GAME.sample(rng, "train") for _ in range(3)], group_size=4, seed=seed)
    assert engine.pool.n_free == engine.pool.n_pages, "a dialogue left pages behind"
    return groups


def facts(groups: list[Group]) -> list[object]:
    return [
        (d.first_speaker, [(t.role, t.token_ids, t.logprobs) for t in d.turns])
        for g in groups
        for d in g.dialogues
    ]


def test_each_side_hears_its_own_private_text_and_the_talk_and_nothing_else(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    chat = tokenizer.chat
    for group in play(model, tokenizer):
        for dialogue in group.dialogues:
            for side in (0, 1):
                expected = chat.open(tokenizer.encode(dialogue.scenario.private_text[side]))
                for turn in dialogue.turns:
                    stopped = turn.token_ids[-1] in chat.stop_token_ids
                    if turn.role == side:
                        if turn.kind == "final":
                            expected += chat.heard(tokenizer.encode(GAME.final_prompt))
                        expected += chat.reply() + turn.token_ids + chat.close_reply(stopped)
                    elif turn.kind == "utterance":
                        expected += chat.heard(turn.token_ids[:-1] if stopped else turn.token_ids)
                assert dialogue.views[side].token_ids == expected


def test_changing_one_sides_private_text_leaves_the_others_context_alone(tokenizer: Tokenizer) -> None:
    """The same words, other private values: the hearer's ids must not change in a single place."""
    from dataclasses import replace

    dialogue = SCRIPTS[3]
    private = dialogue.scenario.private_text
    altered = replace(
        dialogue, scenario=replace(dialogue.scenario, private_text=("9 book worth 9", private[1]))
    )
    before, after = demonstration_rows(dialogue, tokenizer, 0), demonstration_rows(altered, tokenizer, 0)
    assert before[1].token_ids == after[1].token_ids
    assert before[0].token_ids != after[0].token_ids


def test_a_token_is_marked_if_and_only_if_it_was_sampled_there(model: Decoder, tokenizer: Tokenizer) -> None:
    for group in play(model, tokenizer):
        for dialogue in group.dialogues:
            for side, view in enumerate(dialogue.views):
                marked = [
                    (t, lp)
                    for t, lp, kind in zip(view.token_ids, view.logprobs, view.kinds, strict=True)
                    if kind != PROMPT
                ]
                own = [turn for turn in dialogue.turns if turn.role == side]
                assert marked == [
                    (t, lp) for turn in own for t, lp in zip(turn.token_ids, turn.logprobs or [], strict=True)
                ]
                assert all(
                    lp == 0.0 for lp, kind in zip(view.logprobs, view.kinds, strict=True) if kind == PROMPT
                )


@pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)
def test_recorded_logprobs_equal_the_training_forward_after_all_turns(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    views = [
        view
        for group in play(model, tokenizer, cache_tokens=1024)
        for d in group.dialogues
        for view in d.views
    ]
    checked = 0
    for view, scored in zip(views, score(model, [v.token_ids for v in views]), strict=True):
        at = [i for i, kind in enumerate(view.kinds) if kind in (UTTERANCE, FINAL)]
        assert torch.equal(torch.tensor([view.logprobs[i] for i in at]), scored.detach()[[i - 1 for i in at]])
        checked += len(at)
    assert checked > 300


@pytest.mark.skipif(
    not backend.available(),
    reason="batch-independent bits are a promise of the C++ kernels, which are not built",
)
def test_dialogues_follow_from_the_seed_whatever_the_batch_and_the_pool(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    reference = facts(play(model, tokenizer))
    assert facts(play(model, tokenizer, max_batch=5)) == reference
    assert facts(play(model, tokenizer, cache_tokens=512)) == reference
    assert facts(play(model, tokenizer, seed=1)) != reference


def test_a_group_has_one_first_speaker_and_different_dialogues(model: Decoder, tokenizer: Tokenizer) -> None:
    for group in play(model, tokenizer):
        assert len({d.first_speaker for d in group.dialogues}) == 1
        assert all(d.turns[0].role == d.first_speaker for d in group.dialogues)
        assert len({tuple(d.turns[0].token_ids) for d in group.dialogues}) > 1
    firsts = {derive_seed(0, g, "first") % 2 for g in range(20)}
    assert firsts == {0, 1}


def test_unscored_dialogues_give_no_row_and_do_not_move_their_group(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    groups = play(model, tokenizer)
    for group in groups:
        for i, dialogue in enumerate(group.dialogues):
            dialogue.reward = (float(i), float(i))
    groups[0].dialogues[3].reward = None
    rows, counts = grpo_rows(groups, GrpoSection(group_size=4, advantage="mean"), RunningBaseline())
    assert counts["unscored"] == 1
    assert len(rows) == 2 * (3 * 4 - 1)
    assert [r.advantage for r in rows if r.role == 0][:3] == [-1.0, 0.0, 1.0]
    assert groups[0].dialogues[3].advantage is None


def test_train_roles_and_kinds_choose_the_trained_tokens(model: Decoder, tokenizer: Tokenizer) -> None:
    groups = play(model, tokenizer)
    for group in groups:
        for i, dialogue in enumerate(group.dialogues):
            dialogue.reward = (float(i), -float(i))
    both, _ = grpo_rows(groups, GrpoSection(), RunningBaseline())
    first, _ = grpo_rows(
        groups, GrpoSection(train_roles="first", train_kinds=("utterance",)), RunningBaseline()
    )
    assert {row.role for row in both} == {0, 1}
    assert {row.role for row in first} == {0}
    view = groups[0].dialogues[0].views[0]
    assert first[0].loss_mask == [kind == UTTERANCE for kind in view.kinds]
    batch = pack(both)
    assert int(batch.loss_mask.sum()) == sum(
        len(t.token_ids) for g in groups for d in g.dialogues for t in d.turns
    )
