"""Credit by turn: an unbiased gradient (by enumeration), the whole reward where the only score is at the end,
the same tokens trained, and what is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.advantage import RunningBaseline, group_advantages, turn_advantages
from duologue.grpo.build import build_game, training_rules
from duologue.grpo.commands.inspected import turn_advantages as turn_advantages_shown
from duologue.grpo.commands.inspected import why_untrained
from duologue.grpo.config import Config, GrpoSection, load_config
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row, pack
from duologue.grpo.rows import grpo_rows
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.text_game import TextGame, TextGameSettings
from duologue.rollout.games.user_game import GameFailedError
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Group, assign_rewards
from duologue.rollout.selfplay.rules import Rules
from tiny import decoder

METHODS = ("std", "mean", "leave_one_out")
COINS = """
    class Coins:
        '''Each side takes as many coins as it says; whoever passes ends it. A side starts with one coin.'''

        def reset(self, seed):
            self.held, self.turn = [1.0, 1.0], 0

        def observe(self):
            return self.turn % 2, "how many ?"

        def legal(self):
            return ["two", "one", "pass"]

        def step(self, text):
            self.held[self.turn % 2] += ("pass", "one", "two").index(text)
            self.turn += 1
            return text == "pass" or self.turn == 6

        def scores(self):
            return tuple(self.held)

        def scores_so_far(self):
            return tuple(self.held)
"""


def ragged(seed: int) -> tuple[list[list[float]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns by turn of 0 to 4 turns of members of four groups, with ties and some unscored."""
    rng = random.Random(seed)
    returns = [[rng.randrange(4) / 3 for _ in range(rng.randint(1, 4))] for _ in range(25)]
    groups = torch.tensor([rng.randrange(4) for _ in returns])
    roles = torch.tensor([rng.randrange(2) for _ in returns])
    return returns, groups, torch.tensor([rng.random() > 0.2 for _ in returns]), roles


@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_value_for_all_turns_is_the_advantage_of_the_dialogue(method: str, per_role: bool) -> None:
    returns, groups, scored, roles = ragged(1)
    alike = [[values[0]] * len(values) for values in returns]
    how: Any = {"method": method, "roles": roles if per_role else None}
    whole = group_advantages(torch.tensor([values[0] for values in returns]), groups, scored, **how)
    by_turn, counts = turn_advantages(alike, groups, scored, **how)
    assert by_turn == [[a] * len(values) for a, values in zip(whole.value.tolist(), returns, strict=True)]
    assert (counts.groups, counts.no_variance) == (whole.groups, whole.no_variance)


@pytest.mark.parametrize("method", METHODS)
def test_a_turn_is_compared_with_the_same_turn_of_the_others(method: str) -> None:
    returns, groups, scored, roles = ragged(2)
    by_turn, counts = turn_advantages(returns, groups, scored, method=method, roles=roles)
    flat = 0
    for g, role in itertools.product(range(4), range(2)):
        members = [i for i in range(25) if (groups[i], roles[i]) == (g, role) and scored[i]]
        seen: list[float] = []
        for k in range(4 if members else 0):
            column = [(returns[i] + [returns[i][-1]] * 4)[k] for i in members]
            mean = sum(column) / len(column)
            spread = math.sqrt(sum((x - mean) ** 2 for x in column) / max(len(column) - 1, 1))
            scale = {"std": 1 / (spread + 1e-4), "mean": 1.0}.get(
                method, len(column) / max(len(column) - 1, 1)
            )
            expected = [(x - mean) * scale if len({*column}) > 1 else 0.0 for x in column]
            seen += expected
            for i, value in zip(members, expected, strict=True):
                assert k >= len(returns[i]) or by_turn[i][k] == pytest.approx(value, abs=1e-5)
        flat += bool(members) and not any(abs(x) > 1e-6 for x in seen)
    assert counts.no_variance == flat
    assert all(not any(by_turn[i]) for i in range(25) if not scored[i])


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_members_does_not_matter(method: str) -> None:
    returns, groups, scored, roles = ragged(3)
    order = random.Random(0).sample(range(25), 25)
    whole, _ = turn_advantages(returns, groups, scored, method=method, roles=roles)
    shuffled, _ = turn_advantages(
        [returns[i] for i in order], groups[order], scored[order], method=method, roles=roles[order]
    )
    assert [pytest.approx(whole[i], abs=1e-5) for i in order] == shuffled


# ---- the gradient, of all that can happen ------------------------------------------------------------------

STEP = {(): (2.0, 0.3), (0,): (0.5, -1.0)}  # state -> what either action earns


def episodes(logits: dict[tuple[int, ...], torch.Tensor]) -> list[tuple[torch.Tensor, list[Any], float]]:
    """(probability, [(log-prob, what was earned before)], reward) of every episode; one ends after its first
    action, so that groups are ragged.
    """
    found = []
    for path in ((0, 0), (0, 1), (1,)):
        logp, earned, turns = torch.zeros((), dtype=torch.float64), 0.0, []
        for k, action in enumerate(path):
            of_action = logits[path[:k]].log_softmax(0)[action]
            turns.append((of_action, earned))
            logp = logp + of_action
            earned += STEP[path[:k]][action]
        found.append((logp.exp(), turns, earned))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_the_expected_gradient_is_that_of_the_expected_reward(size: int) -> None:
    leaves = {
        state: torch.tensor(start, dtype=torch.float64, requires_grad=True)
        for state, start in {(): [0.4, -0.2], (0,): [0.1, 0.9]}.items()
    }
    parameters = [*leaves.values()]
    every = episodes(leaves)
    true = torch.autograd.grad(sum(p * r for p, _, r in every), parameters, retain_graph=True)
    estimates = {}
    for by_turn in (False, True):
        total = [torch.zeros(2, dtype=torch.float64) for _ in parameters]
        square = 0.0
        for drawn in itertools.product(every, repeat=size):
            returns = [[r - before * by_turn for _, before in turns] for _, turns, r in drawn]
            values, _ = turn_advantages(
                returns,
                torch.zeros(size, dtype=torch.int64),
                torch.ones(size, dtype=torch.bool),
                method="leave_one_out",
            )
            weighted = sum(
                value * logp
                for (_, turns, _), of_member in zip(drawn, values, strict=True)
                for (logp, _), value in zip(turns, of_member, strict=True)
            )
            gradient = torch.autograd.grad(weighted / size, parameters, retain_graph=True, allow_unused=True)
            probability = math.prod(p.item() for p, _, _ in drawn)
            for part, g in zip(total, gradient, strict=True):
                if g is not None:
                    part += probability * g
                    square += probability * float(g.square().sum())
        estimates[by_turn] = square
        for ours, exact in zip(total, true, strict=True):
            assert torch.allclose(ours, exact, atol=1e-6)
    assert estimates[True] < estimates[False]  # what was earned before a turn is no noise of it


# ---- dialogues ---------------------------------------------------------------------------------------------


def coins(folder: Path, text: str = COINS) -> TextGame:
    path = folder / f"coins{len(text)}.py"  # a module is read once
    path.write_text(textwrap.dedent(text))
    game = build_game(Config(game=TextGameSettings(name=str(path))))
    assert isinstance(game, TextGame)
    return game


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how many ? one two pass"] * 4, 300)


def played(game: TextGame, tokenizer: Tokenizer, step_scores: bool = True) -> tuple[Decoder, list[Group]]:
    model = decoder(vocab_size=tokenizer.vocab_size, max_position_embeddings=200)
    rules = Rules(max_tokens_per_turn=8, step_scores=step_scores)
    arena = Arena(Engine(model, cache_tokens=8192), tokenizer, game, rules)
    rng = random.Random(0)
    groups = arena.play([game.sample(rng, "train") for _ in range(3)], group_size=6, seed=3)
    assign_rewards(game, [d for group in groups for d in group.dialogues])
    return model, groups


def rows_of(groups: Sequence[Group], **settings: Any) -> list[Row]:
    return grpo_rows(copy.deepcopy([*groups]), GrpoSection(**settings), RunningBaseline())[0]


def test_every_turn_has_what_came_from_it_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, groups = played(coins(tmp_path), tokenizer)
    config = GrpoSection(credit="turn", advantage="mean")
    rows, _ = grpo_rows(groups, config, RunningBaseline())
    plain = rows_of(groups, advantage="mean")
    assert len(rows) == len(plain) == 2 * 18
    lengths = set()
    for i, dialogue in enumerate(d for group in groups for d in group.dialogues):
        said = dialogue.spoken
        worth = [("pass", "one", "two").index(turn.text) for turn in said]
        for k in range(len(said)):
            later = [sum(worth[j] for j in range(k, len(said)) if said[j].role == side) for side in (0, 1)]
            assert dialogue.returns[k] == tuple(later)
        lengths.add(len(said))
        for side, row, other in zip((0, 1), rows[2 * i : 2 * i + 2], plain[2 * i : 2 * i + 2], strict=True):
            assert row.loss_mask == other.loss_mask
            assert row.logprobs == other.logprobs
            assert row.advantages is not None
            own = [a for turn, a in zip(said, dialogue.turn_advantages, strict=True) if turn.role == side]
            tokens = [
                a
                for turn, a in zip((t for t in said if t.role == side), own, strict=True)
                for _ in turn.token_ids
            ]
            assert [a for a, trained in zip(row.advantages, row.loss_mask, strict=True) if trained] == tokens
            assert not any(a for a, trained in zip(row.advantages, row.loss_mask, strict=True) if not trained)
    assert len(lengths) > 2
    batch = pack(rows)
    assert batch.advantages.tolist() == pytest.approx([a for row in rows for a in row.advantages or ()])


def test_one_score_at_the_end_has_the_bits_of_credit_by_dialogue(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = COINS.replace(
        "return tuple(self.held)\n\n        def scores_so_far(self):\n            return tuple(self.held)",
        "return tuple(self.held)\n\n        def scores_so_far(self):\n            return 0.0, 0.0",
    )
    model, groups = played(coins(tmp_path, text), tokenizer)
    assert all(d.reward == back for g in groups for d in g.dialogues for back in d.returns)
    gradients = []
    for credit in ("dialogue", "turn"):
        rows = rows_of(groups, credit=credit)
        model.zero_grad()
        accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=200)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        values = [row.advantage for row in rows]
    assert len(gradients[0]) > 4
    assert all(map(torch.equal, *gradients))
    assert values == [row.advantage for row in rows_of(groups)]


def test_the_talk_is_the_same_with_and_without(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, noted = played(coins(tmp_path), tokenizer)
    _, plain = played(coins(tmp_path), tokenizer, step_scores=False)
    for with_steps, without in zip(noted, plain, strict=True):
        for a, b in zip(with_steps.dialogues, without.dialogues, strict=True):
            record = a.record()
            assert len(record.pop("so_far")) == len(record.pop("returns")) == len(a.spoken)
            assert record == b.record()


def test_the_inspector_shows_what_each_turn_was_trained_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, groups = played(coins(tmp_path), tokenizer)
    config = GrpoSection(credit="turn")
    grpo_rows(groups, config, RunningBaseline())
    section = {"train_kinds": ["utterance", "final"], "train_roles": "both"}
    for dialogue in (d for group in groups for d in group.dialogues):
        record = dialogue.record(stage="selfplay")
        shown = zip(dialogue.turns, turn_advantages_shown(record), strict=True)
        own = [value for turn, value in shown if turn.kind != "prompt"]
        assert own == [*dialogue.turn_advantages]
        assert why_untrained(record, record["turns"][-1], section) == ""
        record = dialogue.record(stage="selfplay", dropped=True)
        assert why_untrained(record, record["turns"][-1], section).startswith("dropped")


def test_a_cooperative_reward_goes_by_the_mean_of_both(tmp_path: Path, tokenizer: Tokenizer) -> None:
    game = coins(tmp_path)
    game.settings = dataclasses.replace(game.settings, objective="cooperative")
    _, groups = played(game, tokenizer)
    for dialogue in (d for group in groups for d in group.dialogues):
        assert dialogue.outcome is not None
        for so_far, back in zip(dialogue.so_far, dialogue.returns, strict=True):
            mean = (sum(dialogue.outcome.scores) - sum(so_far)) / 2
            assert back == (mean, mean)


# ---- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more", "accepted"),
    [
        ("deal", (), "'dialogue' with a game that has no score before its end"),
        ("dynamic-alignment", (), "'dialogue' with a game that has no score before its end"),
        ("text-game", ("grpo.advantage=running",), "'dialogue' with grpo.advantage = 'running'"),
        ("text-game", ("grpo.loss=gspo",), "'dialogue' with grpo.loss = 'gspo'"),
    ],
)
def test_what_does_not_go_with_it(recipe: str, more: tuple[str, ...], accepted: str) -> None:
    name = ["game.name=mine.py"] if recipe == "text-game" else []
    with pytest.raises(ValueError, match=f"grpo.credit = .turn.: accepted is {accepted}"):
        load_config(recipe, ["grpo.credit=turn", *name, *more])


def test_a_game_without_scores_before_its_end_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    game = coins(tmp_path, COINS.replace("scores_so_far", "something_else"))
    config = Config(game=game.settings, grpo=GrpoSection(credit="turn"))
    with pytest.raises(
        ValueError, match=r"grpo\.credit = 'turn': accepted is 'dialogue', for .*coins\d+\.py has no"
    ):
        training_rules(config, game)
    assert training_rules(config, coins(tmp_path)).step_scores
    wrong = COINS.replace(
        "def scores_so_far(self):\n            return tuple(self.held)",
        "def scores_so_far(self):\n            return 1.0",
    )
    with pytest.raises(GameFailedError, match=r"scores_so_far\(\) gave 1\.0: accepted is two finite numbers"):
        played(coins(tmp_path, wrong), tokenizer)
