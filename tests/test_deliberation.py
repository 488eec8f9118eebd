"""Deliberations: who sees what, when the judge is asked, and that the gradient falls on tokens of the
trained kinds alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo import update
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.commands.inspected import Dialogues
from duologue.grpo.config import GrpoSection
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Batch, Row, hidden_nodes
from duologue.grpo.rows import grpo_rows
from duologue.kernels import backend
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.dilemma import AloneGame, DilemmaGame, DilemmaSettings
from duologue.rollout.games.template import fill
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import AGREEMENT, REQUIRED, SCORE, load_prompt
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import (
    FINAL,
    PROMPT,
    UTTERANCE,
    Dialogue,
    Group,
    assign_rewards,
)
from duologue.rollout.selfplay.rules import Rules
from judge_server import answer, inside, scores
from torch import Tensor

ONE = {
    "id": "cost",
    "first": {"name": "Ada", "instructions": "spend little"},
    "second": {"name": "Bo", "instructions": "buy well"},
}
TWO = {
    "id": "time",
    "first": {"name": "Cy", "instructions": "be quick"},
    "second": {"name": "Di", "instructions": "be sure"},
}
RULES = {
    "max_rounds": 3,
    "max_tokens_per_turn": 9,
    "max_tokens_final": 11,
    "temperature": 0.7,
    "top_p": 0.9,
    "context": "last_2",
}
TEMPLATE = (  # thoughts stand before a reply and leave the history, as in Qwen3
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ '(think)' if m['role'] == 'assistant' and loop.last }}{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>(think)' }}{% endif %}"
)


class Scripted:
    """A back end in this thread that holds every answer back until nothing else goes on, then gives it by
    `judge`.
    """

    settings: dict[str, object] = {}  # noqa: RUF012
    name = "scripted"

    def __init__(self, judge: Callable[[str, str], dict[str, Any] | None]) -> None:
        self.judge, self.asked, self.waiting = judge, [], []
        self.delay = 0

    def ask(self, question: Ask) -> None:
        self.asked.append((question.kind, question.text))
        self.waiting.append([self.delay, question])

    def work(self) -> bool:
        for entry in self.waiting:
            entry[0] -= 1
        for _, question in [entry for entry in self.waiting if entry[0] < 0]:
            given = self.judge(question.kind, question.text)
            if given is not None:
                question.check(json.dumps(given))
            question.done(None if given is None else json.dumps(given), "it has no answer")
        self.waiting = [entry for entry in self.waiting if entry[0] >= 0]
        return True

    def close(self) -> None:
        return


@pytest.fixture(scope="module", params=["plain", "rewriting"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    text = [
        "what is right and who pays for it",
        "I spend little and buy well",
        "(think) be quick be sure",
    ] * 4
    return train_tokenizer(text, 320, None if request.param == "plain" else TEMPLATE)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train_tokenizer(["what is right and who pays for it", "I spend little and buy well"] * 4, 320)


def decoder(tokenizer: Tokenizer) -> Decoder:
    model = Decoder(
        ModelConfig(
            model_type="qwen3",
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=2000,
        )
    )
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # far from uniform, so that supports are small
    return model


@pytest.fixture
def game(tmp_path: Path) -> Callable[..., DilemmaGame]:
    def make(alone: bool = False) -> DilemmaGame:
        rows = {
            "dilemmas": [{"id": "d1", "text": "who pays?"}, {"id": "d2", "text": "is it right?"}],
            "personas": [ONE, TWO],
            "tasks": [{**ONE, "id": "t1", "text": "buy or not?"}],
        }
        for key, found in rows.items():
            (tmp_path / f"{key}.jsonl").write_text("\n".join(map(json.dumps, found)))
        settings = DilemmaSettings(**{key: str(tmp_path / f"{key}.jsonl") for key in rows})
        return (AloneGame if alone else DilemmaGame)(settings)

    return make


def by_known(kind: str, text: str) -> dict[str, Any]:
    return answer(text)


def refusing(kind: str, text: str) -> dict[str, Any]:
    return {"agreed": False} if kind == AGREEMENT else answer(text)


class Table:
    """What a deliberation is made of, and the groups that it played."""

    def __init__(
        self, game: DilemmaGame, tokenizer: Tokenizer, path: Path, judge: Any = by_known, **rules: Any
    ) -> None:
        engine: dict[str, Any] = rules.pop("engine", {})
        delay = rules.pop("delay", 0)
        self.model, self.tokenizer, self.game = decoder(tokenizer), tokenizer, game
        self.backend = Scripted(judge)
        self.backend.delay = delay
        prompts = {kind: load_prompt(kind) for kind in REQUIRED}
        self.judge = FeedbackJudge(self.backend, Ledger(path), prompts, max_unscored_share=0.99)
        self.engine = Engine(self.model, **{"cache_tokens": 16384, **engine})
        self.arena = Arena(self.engine, tokenizer, game, Rules(**{**RULES, **rules}), self.judge)

    def play(self, n: int = 2, size: int = 4, split: str = "train") -> list[Group]:
        rng = random.Random(1)
        groups = self.arena.play([self.game.sample(rng, split) for _ in range(n)], group_size=size, seed=5)
        assert [len(group.dialogues) for group in groups] == [size] * n
        assert not self.engine.busy
        assert not self.engine._branches
        assign_rewards(self.game, [d for group in groups for d in group.dialogues])
        return groups


@pytest.fixture
def table(game: Any, tmp_path: Path) -> Callable[..., Table]:
    return lambda tokenizer, alone=False, **rules: Table(
        game(alone), tokenizer, tmp_path / "ledger.sqlite", **rules
    )


def every(groups: list[Group]) -> list[Dialogue]:
    return [d for group in groups for d in group.dialogues]


def facts(groups: list[Group]) -> list[Any]:
    return [
        ([(t.role, t.kind, t.token_ids, t.logprobs) for t in d.turns], d.outcome, d.reward)
        for d in every(groups)
    ]


# ---- the protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["first", "alternate", "random"])
def test_rounds_agreement_final_and_score(table: Any, tokenizer: Tokenizer, first: str) -> None:
    here = table(tokenizer, first_speaker=first)
    groups = here.play(n=4)
    firsts = [group.dialogues[0].first_speaker for group in groups]
    assert firsts == {"first": [0] * 4, "alternate": [0, 1, 0, 1]}.get(first, firsts)
    endings = set()
    for d in every(groups):
        talk = [t for t in d.turns if t.kind == "utterance"]
        assert d.outcome is not None
        assert [t.role for t in talk] == [d.first_speaker, 1 - d.first_speaker] * d.outcome.rounds
        assert all(len(t.token_ids) <= 9 for t in talk)
        finals = [t for t in d.turns if t.kind == "final"]
        assert [t.role for t in finals] == [0] * d.outcome.agreed
        # The judge was asked after every round, and what it answered is what happened.
        for rounds in range(1, d.outcome.rounds + 1):
            said = tuple([t.text for t in talk[: 2 * rounds] if t.role == role] for role in (0, 1))
            question = next(
                text
                for kind, text in here.backend.asked
                if kind == AGREEMENT
                and inside(text, 'turn speaker="1"') == said[0]
                and inside(text, 'turn speaker="2"') == said[1]
            )
            assert answer(question)["agreed"] == (d.outcome.agreed and rounds == d.outcome.rounds)
        assert d.outcome.rounds == 3 or d.outcome.agreed
        assert d.reward == ((sum(scores(finals[0].text)) / 4,) * 2 if finals else (0.0, 0.0))
        endings.add((d.outcome.agreed, d.outcome.rounds))
    assert len(endings) > 2


def test_credit_by_turn_has_the_talk_scored_before_each_round_and_the_final(
    table: Any, tokenizer: Tokenizer
) -> None:
    here = table(tokenizer, step_scores=True)
    plain = facts(here.play())
    asked = [inside(text, "completion") for kind, text in here.backend.asked if kind == SCORE]
    for d in every(here.play()):
        assert d.outcome is not None
        assert len(d.so_far) == len(d.returns) == len(d.turns)
        for k, turn in enumerate(d.turns):
            before = k if turn.kind == "final" else k - k % 2
            said = "\n\n".join(f"{d.scenario.personas[t.role].name}: {t.text}" for t in d.turns[:before])
            value = sum(scores(said)) / 4 if before else 0.0
            assert d.so_far[k] == (value, value)
            assert not before or [said.strip()] in asked
            assert d.returns[k] == (d.outcome.scores[0] - value,) * 2
    assert plain == facts(here.play())


def test_a_talk_whose_score_nobody_gives_before_its_end_is_unscored(table: Any, plain: Tokenizer) -> None:
    judge = lambda kind, text: None if kind == SCORE else {"agreed": False}  # noqa: E731
    here = table(plain, step_scores=True, judge=judge)
    here.judge.max_unscored_share = 1.0
    for d in every(here.play()):
        assert d.reward is None
        assert len(d.turns) == 2


def test_what_the_judge_was_asked_is_kept_and_can_be_written_again(table: Any, plain: Tokenizer) -> None:
    here = table(plain)
    shown = Dialogues(DilemmaGame, {"grpo": {}}, None, here.judge.prompts)
    for d in every(here.play(n=3)):
        assert d.outcome is not None
        rounds = [(AGREEMENT, 2 * n) for n in range(1, d.outcome.rounds + 1)]
        last = [("score", len(d.turns))] if d.outcome.agreed else []
        assert [(each.kind, each.turns) for each in d.asked] == rounds + last
        assert all(each.seconds >= 0 for each in d.asked)
        record = d.record(by_token=True)
        assert "asked" not in d.record()
        for each in record["asked"]:
            places = shown._asked(record, each)["places"]
            text = fill(here.judge.prompts[each["kind"]].template, places)
            assert (each["kind"], text) in here.backend.asked
            if each["kind"] == AGREEMENT:
                assert each["answer"] == {"agreed": answer(text)["agreed"]}


def test_a_final_is_always_written_in_evaluation_but_scored_only_after_an_agreement(
    table: Any, plain: Tokenizer
) -> None:
    here = table(plain, always_final=True, judge=refusing)
    for d in every(here.play(split="heldout")):
        assert d.turns[-1].kind == "final"
        assert d.outcome is not None
        assert (d.outcome.agreed, d.outcome.failure, d.reward) == (False, "no_agreement", (0.0, 0.0))
    assert {kind for kind, _ in here.backend.asked} == {AGREEMENT}


def test_alone_one_answer_is_written_and_scored(table: Any, tokenizer: Tokenizer) -> None:
    here = table(tokenizer, alone=True, temperature=1.0, top_p=1.0)
    for d in every(here.play()):
        assert [(t.role, t.kind) for t in d.turns] == [(0, "final")]
        assert d.reward == (sum(scores(d.turns[0].text)) / 4,) * 2
        (view,) = d.views
        assert here.tokenizer.decode(view.token_ids).count(d.scenario.shared_text) == 1


def test_an_unanswered_question_is_unscored_and_enters_no_group(table: Any, plain: Tokenizer) -> None:
    lost: list[str] = []

    def judge(kind: str, text: str) -> dict[str, Any] | None:
        if kind != AGREEMENT and scores(inside(text, "completion")[0])[0] > 2:
            lost.append(inside(text, "completion")[0])
            return None
        return answer(text)

    groups = table(plain, judge=judge).play(n=4, size=6)
    unscored = [d for d in every(groups) if d.reward is None]
    assert sorted(d.turns[-1].text for d in unscored) == sorted(lost)
    assert lost
    config = GrpoSection(train_roles="first", train_kinds=("utterance",))
    rows, stats = grpo_rows(groups, config, RunningBaseline())
    assert stats["unscored"] == len(lost)
    assert all(d.advantage is None for d in unscored)
    assert {row.dialogue_id for row in rows} == {
        i for i, d in enumerate(every(groups)) if d.reward is not None
    }
    for group in groups:  # the mean is over the scored alone
        values = [d.advantage[0] for d in group.dialogues if d.advantage]
        assert sum(values) == pytest.approx(0, abs=1e-4)


def test_judging_overlaps_with_the_rollouts_and_its_order_changes_nothing(
    table: Any, plain: Tokenizer, tmp_path: Path
) -> None:
    reference = facts(table(plain).play())
    assert facts(table(plain, engine={"max_batch": 3}, delay=7).play()) == reference
    (tmp_path / "ledger.sqlite").unlink()
    slow = table(plain, engine={"decode_steps": 1}, delay=5)
    turns_while_waiting = 0
    step = slow.engine.step

    def count() -> Any:
        nonlocal turns_while_waiting
        turns_while_waiting += bool(slow.backend.waiting)
        return step()

    slow.engine.step = count
    assert facts(slow.play()) == reference
    assert turns_while_waiting > 10


def test_draws_are_made_as_the_rules_say(table: Any, plain: Tokenizer) -> None:
    here = table(plain, final_temperature=0.1, final_top_p=0.5)
    seen = []
    start = here.engine.start

    def spy(branch: Any, params: Any) -> Any:
        seen.append(params)
        return start(branch, params)

    here.engine.start = spy
    groups = here.play()
    finals = [p for p in seen if p.max_new_tokens == 11]
    talk = [p for p in seen if p.max_new_tokens == 9]
    assert len(finals) == sum(t.kind == "final" for d in every(groups) for t in d.turns) > 0
    assert {(p.temperature, p.top_p) for p in finals} == {(0.1, 0.5)}
    assert {(p.temperature, p.top_p) for p in talk} == {(0.7, 0.9)}
    assert len({p.seed for p in seen}) == len(seen)


# ---- contexts ----------------------------------------------------------------------------------------------


def context(d: Dialogue, tokenizer: Tokenizer, game: DilemmaGame, role: int, said: list[Any]) -> list[int]:
    """What a context must be: rendered by the template itself, with sampled ids in place of the contents."""
    chat, persona = tokenizer.turn_chat, d.scenario.personas[role]
    private = [*tokenizer.encode(d.scenario.shared_text), *tokenizer.encode(game.private_text(persona))]
    ids = chat.open(private)
    for turn in said:
        words = [t for t in turn.token_ids if t not in chat.stop_token_ids]
        ids += chat.said(words) if turn.role == role else chat.heard(words)
    return ids + chat.reply()


def test_with_last_2_a_turn_sees_its_persona_the_dilemma_and_two_turns(
    table: Any, tokenizer: Tokenizer
) -> None:
    here = table(tokenizer, context="last_2", first_speaker="alternate")
    for d in every(here.play()):
        assert len(d.views) == len(d.turns)
        for i, (turn, view, role) in enumerate(zip(d.turns, d.views, d.view_roles, strict=True)):
            assert role == turn.role
            marked = [
                (t, lp)
                for t, lp, kind in zip(view.token_ids, view.logprobs, view.kinds, strict=True)
                if kind != PROMPT
            ]
            assert marked == list(zip(turn.token_ids, turn.logprobs or [], strict=True))
            if turn.kind == "utterance":
                before = context(d, tokenizer, here.game, role, d.turns[max(0, i - 2) : i])
                assert view.token_ids == before + turn.token_ids
                assert set(view.kinds) == {PROMPT, UTTERANCE}


def test_with_full_a_context_grows_and_keeps_its_kv(table: Any, plain: Tokenizer) -> None:
    here = table(plain, context="full")
    groups = here.play()
    for d in every(groups):
        talk = [t for t in d.turns if t.kind == "utterance"]
        assert d.view_roles == (0, 1, 0)[: 2 + (d.turns[-1].kind == "final")]
        for role in (0, 1):
            view = d.views[role]
            own = [i for i, t in enumerate(talk) if t.role == role]
            longest = context(d, plain, here.game, role, talk[: own[-1]])
            assert (
                view.token_ids[: len(longest) + len(talk[own[-1]].token_ids)]
                == longest + talk[own[-1]].token_ids
            )
            marked = [t for t, kind in zip(view.token_ids, view.kinds, strict=True) if kind == UTTERANCE]
            assert marked == [t for i in own for t in talk[i].token_ids]
    views = [view for d in every(groups) for view in d.views]
    turns = sum(len(d.turns) for d in every(groups))  # the token before a turn may be computed again
    assert (
        here.engine.stats.prefill_tokens
        <= sum(kind == PROMPT for view in views for kind in view.kinds) + turns
    )


def test_no_private_text_reaches_the_other_side_and_the_final_sees_both(
    table: Any, tokenizer: Tokenizer
) -> None:
    for rules in ({"context": "last_2"}, {"context": "full"}):
        if rules["context"] == "full" and "think" in tokenizer.decode(tokenizer.turn_chat.reply()):
            with pytest.raises(ValueError, match=r"rewrites turn 2.*append-only"):
                table(tokenizer, **rules)
            continue
        for d in every(table(tokenizer, **rules).play()):
            talk = [t for t in d.turns if t.kind == "utterance"]
            for view, role in zip(d.views, d.view_roles, strict=True):
                prompt = tokenizer.decode(
                    [t for t, kind in zip(view.token_ids, view.kinds, strict=True) if kind == PROMPT]
                )
                own, other = d.scenario.personas[role], d.scenario.personas[1 - role]
                if FINAL in view.kinds:
                    assert own.instructions in prompt
                    assert other.instructions in prompt
                    for turn in talk:
                        words = tokenizer.decode(turn.token_ids)
                        assert f"{d.scenario.personas[turn.role].name}: {words}" in prompt
                else:
                    assert own.instructions in prompt
                    assert other.instructions not in prompt
                    assert other.name not in prompt


@pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)
@pytest.mark.parametrize("how", ["last_2", "full"])
def test_recorded_logprobs_equal_the_training_forward(table: Any, plain: Tokenizer, how: str) -> None:
    here = table(plain, context=how, top_p=1.0, temperature=1.0)
    views = [view for d in every(here.play()) for view in d.views]
    for view, scored in zip(views, score(here.model, [v.token_ids for v in views]), strict=True):
        at = [i for i, kind in enumerate(view.kinds) if kind != PROMPT]
        assert torch.equal(torch.tensor([view.logprobs[i] for i in at]), scored.detach()[[i - 1 for i in at]])


def test_the_longest_context_is_a_bound_that_is_nearly_met(table: Any, tokenizer: Tokenizer) -> None:
    for rules in ({"context": "last_2"}, {"alone": True}, {"context": "full"}):
        if rules.get("context") == "full" and "think" in tokenizer.decode(tokenizer.turn_chat.reply()):
            continue
        here = table(tokenizer, judge=refusing, always_final=True, **rules)
        found = max(len(view.token_ids) for d in every(here.play(n=6, split="heldout")) for view in d.views)
        assert found <= here.arena.contexts.longest() < 1.6 * found


# ---- the gradient ------------------------------------------------------------------------------------------


def supports(rows: list[Row]) -> dict[tuple[int, ...], list[int]]:
    """What each trained token was drawn from, by what stands before it; an empty list stands for all
    tokens.
    """
    found = {}
    for row in rows:
        assert row.supports is not None
        start = 0
        for t, (size, trained) in enumerate(zip(row.supports.sizes, row.loss_mask, strict=True)):
            if trained:
                found[tuple(row.token_ids[:t])] = row.supports.ids[start : start + size].tolist()
            start += size
    return found


@pytest.mark.parametrize("how", ["last_2", "full"])
@pytest.mark.parametrize(
    ("roles", "kinds"),
    [("first", ("utterance",)), ("both", ("utterance",)), ("first", ("utterance", "final"))],
)
def test_the_gradient_is_that_of_the_trained_kinds_and_zero_elsewhere(
    table: Any,
    plain: Tokenizer,
    how: str,
    roles: str,
    kinds: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64 autograd over contexts that are built here from the dialogues' turns alone, each
    token's softmax cut to its support. And token by token: the gradient on the hidden state before any
    token of another kind or side is exactly 0.
    """
    here = table(plain, context=how, max_rounds=2)
    groups = here.play()
    rows, _ = grpo_rows(
        groups, GrpoSection(train_roles=roles, train_kinds=kinds, per_role=False), RunningBaseline()
    )
    packed: list[tuple[Batch, Tensor]] = []

    def watch(model: Decoder, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        hidden = hidden_nodes(model, batch, dropout_seed)
        hidden.retain_grad()
        packed.append((batch, hidden))
        return hidden

    monkeypatch.setattr(update, "hidden_nodes", watch)
    update.accumulate_policy_gradient(here.model, rows, LossConfig(), temperature=0.7, max_tokens=500)
    trained = (0,) if roles == "first" else (0, 1)
    for batch, hidden in packed:
        assert hidden.grad is not None
        moved = set(hidden.grad.abs().sum(1).nonzero().flatten().tolist())
        assert moved
        assert moved <= set(batch.nodes[batch.targets - 1].tolist())
    wanted = [
        turn.token_ids
        for d in every(groups)
        for turn in d.turns
        if turn.role in trained and turn.kind in kinds
    ]
    marked = [[t for t, m in zip(row.token_ids, row.loss_mask, strict=True) if m] for row in rows]
    assert sorted(t for ids in wanted for t in ids) == sorted(t for ids in marked for t in ids)

    exact, drawn_from = copy.deepcopy(here.model).double(), supports(rows)
    exact.zero_grad(set_to_none=True)
    loss, total = torch.zeros((), dtype=torch.float64), sum(map(len, wanted))
    for d in every(groups):
        talk = [t for t in d.turns if t.kind == "utterance"]
        for i, turn in enumerate(d.turns):
            if turn.role not in trained or turn.kind not in kinds:
                continue
            (final,) = [v.token_ids for v in d.views if FINAL in v.kinds] or [[]]
            said = talk[max(0, i - 2) if how == "last_2" else 0 : i]
            before = (
                final[: -len(turn.token_ids)]
                if turn.kind == "final"
                else context(d, plain, here.game, turn.role, said)
            )
            z = exact(torch.tensor([before + turn.token_ids]))[0].double() / 0.7
            assert d.advantage is not None
            for k, token in enumerate(turn.token_ids):
                row = z[len(before) + k - 1]
                logp = row[token] - row[drawn_from[(*before, *turn.token_ids[:k])] or slice(None)].logsumexp(
                    0
                )
                loss = loss - d.advantage[turn.role] * torch.exp(logp - logp.detach()) / total
    torch.autograd.backward(loss)
    for (name, parameter), (_, other) in zip(
        here.model.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=2e-3, atol=2e-6)
    assert max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None) > 1e-3
