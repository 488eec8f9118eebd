"""What somebody adds: a protocol is one function, a game is one file, an entry and a recipe; both show
everywhere.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import GrpoSection
from duologue.grpo.loss import LossConfig
from duologue.grpo.rows import grpo_rows
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.catalogue import GAMES, SCRIPTS
from duologue.rollout.games.game import Game, Outcome, Scenario
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import FINAL, Group, assign_rewards
from duologue.rollout.selfplay.protocols import PROTOCOLS, Protocol
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Opponent
from duologue.rollout.selfplay.talk import Talk
from test_report import Page
from tiny import TINY, decoder


def ultimatum(talk: Talk) -> Protocol:
    """One offer, one answer, and that is it."""
    (offer,) = yield [talk.turn(talk.first)]
    (answer,) = yield [talk.turn(1 - talk.first, FINAL)]
    if offer is None or answer is None:
        return None
    agreed: bool = talk.game.accepts(answer)
    return Outcome(agreed=agreed, scores=(float(len(offer)), float(len(answer))) if agreed else (0.0, 0.0))


class Ultimatum(Game):
    """Take it or leave it."""

    name = "ultimatum"
    protocol = "ultimatum"
    final_prompt = "take it ?"

    def sample(self, rng: random.Random, split: str) -> Scenario:
        texts = (f"you offer {rng.randrange(9)}", "you answer")
        return Scenario(game=self.name, id=texts[0], split=split, private_text=texts, data=None)

    def accepts(self, answer: str) -> bool:
        return len(answer) % 2 == 0

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
        return outcome.scores

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        return {"dialogues": float(len(outcomes))}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["you offer 3 take it ? you answer 0 1 2"] * 4, 290)


def test_a_third_protocol_is_one_function(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is played, also against an opponent, and the policy learns from its rows."""
    monkeypatch.setitem(PROTOCOLS, "ultimatum", ultimatum)
    game = Ultimatum()
    policy, other = (decoder(vocab_size=tokenizer.vocab_size) for _ in range(2))
    rules = Rules(max_tokens_per_turn=7, max_tokens_final=5, first_speaker="alternate")
    engine, beside = Engine(policy, cache_tokens=8192), Engine(other, cache_tokens=8192)
    arena, rng = Arena(engine, tokenizer, game, rules), random.Random(0)
    scenarios = [game.sample(rng, "train") for _ in range(4)]
    opponents = [None, None, Opponent(role=0, name="other", engine=beside), None]
    groups = arena.play(scenarios, group_size=4, seed=3, opponents=opponents)
    assert [engine.pool.n_free, beside.pool.n_free] == [engine.pool.n_pages, beside.pool.n_pages]
    assign_rewards(game, [d for group in groups for d in group.dialogues])
    for number, group in enumerate(groups):
        for d in group.dialogues:
            first = number % 2
            assert [(t.role, t.kind) for t in d.turns] == [(first, "utterance"), (1 - first, "final")]
            assert d.outcome is not None
            assert d.reward == d.outcome.scores
            heard = tokenizer.decode(d.views[1 - first].token_ids)
            assert d.turns[0].text in heard
            assert "take it ?" in heard
            assert "take it ?" not in tokenizer.decode(d.views[first].token_ids)
    rows, _ = grpo_rows(groups, GrpoSection(per_role=False), RunningBaseline())
    assert len(rows) == 2 * 16 - 4  # the opponent's side of its group gives none
    accumulate_policy_gradient(policy, rows, LossConfig(), temperature=1.0, max_tokens=1000)
    assert max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in other.parameters())


def facts(groups: Sequence[Group]) -> list[Any]:
    return [
        (d.first_speaker, [(t.token_ids, t.logprobs) for t in d.turns]) for g in groups for d in g.dialogues
    ]


def test_groups_are_drawn_by_their_global_number(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of a step, played apart, are the whole step."""
    monkeypatch.setitem(PROTOCOLS, "ultimatum", ultimatum)
    policy, game = decoder(vocab_size=tokenizer.vocab_size), Ultimatum()
    rng = random.Random(0)
    scenarios = [game.sample(rng, "train") for _ in range(4)]
    for first_speaker in ("random", "alternate"):
        rules = Rules(max_tokens_per_turn=7, max_tokens_final=5, first_speaker=first_speaker)
        arena = Arena(Engine(policy, cache_tokens=8192), tokenizer, game, rules)
        whole = facts(arena.play(scenarios, group_size=3, seed=5, step=1))
        halves = [
            arena.play(scenarios[i : i + 2], group_size=3, seed=5, step=1, first_group=i) for i in (0, 2)
        ]
        assert [fact for half in halves for fact in facts(half)] == whole
        assert facts(arena.play(scenarios[2:], group_size=3, seed=5, step=1)) != facts(halves[1])


GAME = '''
from duologue.rollout.games.game import Measure, Outcome, Scenario
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.games.selection import CLOSE, SelectionGame


class GuessGame(SelectionGame):
    """Both name one number, which should be the same."""

    name = "guess"
    splits = {"train": list(range(8)), "heldout": [8, 9]}
    measures = {
        "agreement": Measure("same guess", "{:.1%}", "same"),
        "sum": Measure("sum of guesses", "{:.2f}", "sum"),
    }
    failures = {"no_close": "nobody dared to close", "apart": "two guesses far apart"}

    def scenario(self, context, split):
        text = f"think of {context}"
        return Scenario(game="guess", id=str(context), split=split, private_text=(text, text), data=context)

    def judge(self, scenario, finals):
        if finals is None:
            return Outcome(agreed=False, scores=(0.0, 0.0), failure="no_close")
        if finals[0] != finals[1]:
            return Outcome(agreed=False, scores=(0.0, 0.0), failure="apart")
        return Outcome(agreed=True, scores=(1.0, 1.0), metrics={"sum": 2.0 * scenario.data})

    def rewards(self, scenario, outcome):
        return outcome.scores

    def summarise(self, outcomes):
        n = max(len(outcomes), 1)
        shares = {f"failure_{kind}": sum(o.failure == kind for o in outcomes) / n for kind in self.failures}
        total = sum(o.metrics.get("sum", 0.0) for o in outcomes)
        agreement = sum(o.agreed for o in outcomes) / n
        return {"dialogues": float(len(outcomes)), "agreement": agreement, "sum": total, **shares}


def script(game, scenario, rng):
    said = str(scenario.data)
    turns = [(0, f"i say {said}", "utterance"), (1, f"so do i {CLOSE}", "utterance")]
    turns += [(1, said, "final"), (0, said, "final")]
    outcome = game.judge(scenario, (said, said))
    return ScriptedDialogue(
        scenario=scenario,
        first_speaker=0,
        temperaments=("", ""),
        turns=turns,
        outcome=outcome,
        final_prompt=game.final_prompt,
    )
'''
RECIPE = """
[game]
name = "guess"
[dialogue]
max_rounds = 2
max_tokens_per_turn = 12
max_tokens_final = 6
"""


def test_a_new_game_is_a_file_an_entry_and_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own measures and failures stand in the progress line, the table and the report."""
    (tmp_path / "guess.py").write_text(GAME)
    (tmp_path / "guess.toml").write_text(RECIPE)
    spec = importlib.util.spec_from_file_location("guess", tmp_path / "guess.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "guess", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(GAMES, "guess", module.GuessGame)
    monkeypatch.setitem(SCRIPTS, "guess", module.script)
    from duologue.grpo.cli import main

    path = tmp_path / "run"
    assert main(["train", str(tmp_path / "guess.toml"), *TINY, "--run-dir", str(path)]) == 0
    shown = capsys.readouterr().out
    progress = next(line for line in shown.splitlines() if line.startswith("self-play 2/2"))
    assert "same " in progress
    assert "sum " in progress
    assert "same guess" in shown
    assert "sum of guesses" in shown
    page = Page((path / "report.html").read_text("utf-8"))
    assert "same guess" in page.text
    assert "sum of guesses" in page.text
    assert "think of" in page.text
    assert "nobody dared to close" in page.text or "two guesses far apart" in page.text
