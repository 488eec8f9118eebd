"""A game of a user: what it tells the sides is all they see, its legal moves are held, its draws are its own,
and what is wrong with it is said in a line.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.build import build_game, check_context
from duologue.grpo.cli import main
from duologue.grpo.config import Config, GrpoSection, from_dict, load_config
from duologue.grpo.console import Progress
from duologue.grpo.imitation import demonstration_rows
from duologue.grpo.loss import LossConfig
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir, read_lines
from duologue.grpo.trainer import train
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.trie import TokenTrie
from duologue.rollout.games.text_game import MEASURES, TAKEN, TextGame, TextGameSettings
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import UTTERANCE, Dialogue, assign_rewards
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Opponent
from safetensors.torch import load_file
from tiny import TINY, all_text, decoder, lines

KUHN = """
    import random

    class Kuhn:
        '''Kuhn poker: three cards, one each, an ante of 1 and one bet of 1.'''

        def __init__(self, cards=3):
            self.cards = cards

        def reset(self, seed):
            self.held = random.Random(seed).sample(range(self.cards), 2)
            self.said = []

        def told(self, side):
            return f"your card is {self.held[side]}"

        def observe(self):
            return len(self.said) % 2, self.said[-1] if self.said else ""

        def legal(self):
            return ["call", "fold"] if "bet" in self.said else ["bet", "check"]

        def step(self, text):
            self.said.append(text)
            return text in ("call", "fold") or self.said == ["check", "check"]

        def scores(self):
            if self.said[-1] == "fold":
                loser, stake = (len(self.said) - 1) % 2, 1.0
            else:
                loser, stake = self.held.index(min(self.held)), 2.0 if "bet" in self.said else 1.0
            return (-stake, stake) if loser == 0 else (stake, -stake)

        def summary(self):
            return {"bets": self.said.count("bet")}

        def script(self, side, rng):
            return rng.choice(self.legal())
"""
WORDS = ["your card is 0 1 2 3 4 5 6 7 8 9", "call fold bet check", "say one word or two"]
PAYOFF = {  # of the side that has the higher card, which is the first or not: by hand
    ("check", "check"): (1, 1),
    ("bet", "call"): (2, 2),
    ("bet", "fold"): (1, -1),
    ("check", "bet", "call"): (2, 2),
    ("check", "bet", "fold"): (-1, 1),
}


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def numpys_state() -> list[int]:
    """Of the global generator."""
    state: list[int] = np.random.get_state()[1].tolist()  # noqa: NPY002
    return state


def game_of(name: object, **settings: Any) -> TextGame:
    game = build_game(Config(game=TextGameSettings(name=str(name), **settings)))
    assert isinstance(game, TextGame)
    return game


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS * 4, 300)


def arena_of(game: TextGame, tokenizer: Tokenizer, **rules: Any) -> Arena:
    policy = decoder(vocab_size=tokenizer.vocab_size, max_position_embeddings=rules.pop("limit", 200))
    return Arena(
        Engine(policy, cache_tokens=8192), tokenizer, game, Rules(**{"max_tokens_per_turn": 8, **rules})
    )


def played(arena: Arena, n: int = 6, group_size: int = 4) -> list[Dialogue]:
    rng = random.Random(0)
    scenarios = [arena.game.sample(rng, "train") for _ in range(n)]
    groups = arena.play(scenarios, group_size=group_size, seed=3)
    assert arena.engine.pool.n_free == arena.engine.pool.n_pages
    return [dialogue for group in groups for dialogue in group.dialogues]


def moves(dialogue: Dialogue) -> list[str]:
    return [turn.text for turn in dialogue.turns if turn.kind == "utterance"]


# ---- what is played ----------------------------------------------------------------------------------------


def test_scores_contexts_and_masks_of_kuhn_poker(tmp_path: Path, tokenizer: Tokenizer) -> None:
    game = game_of(written(tmp_path, KUHN), options={"cards": 8})
    arena = arena_of(game, tokenizer)
    dialogues = played(arena, n=10, group_size=8)
    assert len({tuple(moves(d)) for d in dialogues}) == len(PAYOFF)  # every line of the game was taken
    exact = decoder(vocab_size=tokenizer.vocab_size, max_position_embeddings=200).double()
    stop = tokenizer.chat.end_token_id
    for d in dialogues:
        cards = [int(text[-1]) for text in d.scenario.private_text]
        higher = PAYOFF[tuple(moves(d))][cards[1] > cards[0]]
        first = higher if cards[0] > cards[1] else -higher
        assert d.outcome is not None
        assert d.outcome.scores == (first, -first)
        assert d.outcome.metrics["bets"] == moves(d).count("bet")
        assert d.outcome.metrics["illegal"] == 0
        for side, view in enumerate(d.views):
            seen = [turn for turn in d.turns if turn.role == side]
            text = all_text(tokenizer, view.token_ids)
            assert d.scenario.private_text[side] in text
            assert d.scenario.private_text[1 - side] not in text
            trained = [i for i, kind in enumerate(view.kinds) if kind == UTTERANCE]
            ids = [i for turn in seen if turn.kind == "utterance" for i in turn.token_ids]
            assert [view.token_ids[i] for i in trained] == ids
            logits = exact(torch.tensor([view.token_ids]))[0].detach()
            at = iter(trained)
            for turn in (turn for turn in seen if turn.kind == "utterance"):
                pair = ("call", "fold") if turn.text in ("call", "fold") else ("bet", "check")
                trie = TokenTrie([[*tokenizer.encode(word), stop] for word in pair])
                for n, token in enumerate(turn.token_ids):
                    i, allowed = next(at), trie(turn.token_ids[:n])
                    expected = logits[i - 1][allowed].log_softmax(0)[allowed.index(token)]
                    assert abs(view.logprobs[i] - float(expected)) < 1e-5


def test_training_has_the_bits_of_the_rollout(tmp_path: Path, tokenizer: Tokenizer) -> None:
    game = game_of(written(tmp_path, KUHN))
    arena = arena_of(game, tokenizer, temperature=0.8)
    rng = random.Random(1)
    groups = arena.play([game.sample(rng, "train") for _ in range(4)], group_size=6, seed=1)
    assign_rewards(game, [d for group in groups for d in group.dialogues])
    rows, _ = grpo_rows(groups, GrpoSection(), RunningBaseline())
    model = arena.engine.model
    stats = accumulate_policy_gradient(model, rows, LossConfig(), temperature=0.8, max_tokens=500)
    assert stats.metrics()["mismatch"] == 0.0
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 0


def test_a_dialogue_does_not_depend_on_those_beside_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same seeds, all at once and group by group; the draws of other games lie in between."""
    game = game_of(written(tmp_path, KUHN.replace("random.Random(seed).sample", "random.sample")))
    rng = random.Random(0)
    scenarios = [game.sample(rng, "train") for _ in range(4)]
    assert len({s.private_text for s in scenarios}) > 1
    arena = arena_of(game, tokenizer)
    before, of_numpy = random.getstate(), numpys_state()
    whole = arena.play(scenarios, group_size=2, seed=5)
    parts = [arena.play([s], group_size=2, seed=5, first_group=i)[0] for i, s in enumerate(scenarios)]
    assert [[d.record() for d in g.dialogues] for g in whole] == [
        [d.record() for d in g.dialogues] for g in parts
    ]
    assert (before, of_numpy) == (random.getstate(), numpys_state())


TALK = """
    import numpy as np

    class Talk:
        '''Side 1 speaks three times in a row, then side 0; an odd number of characters is said back once.'''

        def reset(self, seed):
            self.order, self.said, self.back, self.wrong = [1, 1, 1, 0], [], "", 0
            self.number = int(np.random.randint(100))

        def observe(self):
            told, self.back = self.back or ("say one word" if len(self.said) in (0, 3) else ""), ""
            return self.order[len(self.said)], told

        def step(self, text):
            if len(text) % 2 and self.wrong < 3:
                self.back, self.wrong = f"say two word {self.number}", self.wrong + 1
                return False
            self.said.append(text)
            return len(self.said) == 4

        def scores(self):
            return len(self.said[3]), sum(map(len, self.said[:3]))

        def summary(self):
            return {"illegal": self.wrong, "agreement": self.wrong == 0}
"""


def test_sides_move_in_any_order_and_illegal_moves_are_said_back(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    game = game_of(written(tmp_path, TALK))
    dialogues = played(arena_of(game, tokenizer))
    assert {d.first_speaker for d in dialogues} == {1}
    chat = tokenizer.chat
    for d in dialogues:
        back = [turn for turn in d.turns if turn.kind == "prompt" and "two" in turn.text]
        spoken = [turn for turn in d.turns if turn.kind == "utterance"]
        assert d.outcome is not None
        assert d.outcome.metrics["illegal"] == len(back)
        assert len(spoken) == 4 + len(back)
        assert d.outcome.agreed == (not back)
        accepted = [t for i, t in enumerate(spoken) if not _is_said_back(d, t)]
        assert [turn.role for turn in accepted] == [1, 1, 1, 0]
        lengths = [len(turn.text) for turn in accepted]
        assert d.outcome.scores == (lengths[3], sum(lengths[:3]))
        for side, view in enumerate(d.views):
            ids = chat.open([])
            for turn in (turn for turn in d.turns if turn.role == side):
                if turn.kind == "prompt":
                    ids += chat.heard(tokenizer.encode(turn.text))
                else:
                    stopped = turn.token_ids[-1] in chat.stop_token_ids
                    ids += chat.reply() + turn.token_ids + chat.close_reply(stopped)
            assert view.token_ids == ids
    numbers = {d.scenario.id: {t.text for t in d.turns if "two" in t.text} for d in dialogues}
    assert all(len(texts) <= 1 for texts in numbers.values())  # drawn from numpy's: one of a seed
    shares = game.summarise([d.outcome for d in dialogues if d.outcome])
    assert shares["illegal"] > 0
    assert shares["finished"] == 1.0 > shares["agreement"]


def _is_said_back(dialogue: Dialogue, turn: Any) -> bool:
    after = dialogue.turns[dialogue.turns.index(turn) + 1 :]
    return bool(after) and after[0].kind == "prompt" and "two" in after[0].text


def test_limits_end_a_game(tmp_path: Path, tokenizer: Tokenizer) -> None:
    endless = written(
        tmp_path,
        """
        class Endless:
            def reset(self, seed): self.n = 0
            def observe(self): return self.n % 2, "say one word " * 3
            def step(self, text): self.n += 1; return False
            def scores(self): raise AssertionError("it never ends")
            def summary(self): return {"reached": self.n}
        """,
    )
    game = game_of(endless, unfinished=-0.5)
    for rules, failure, reached in (({"max_rounds": 2}, "unfinished", 4), ({"limit": 60}, "context_full", 0)):
        for d in played(arena_of(game, tokenizer, **rules), n=2):
            assert d.outcome is not None
            assert d.outcome.failure == failure
            assert d.outcome.scores == (-0.5, -0.5) == game.rewards(d.scenario, d.outcome)
            assert d.outcome.metrics["reached"] == reached or not reached
            assert max(len(view.token_ids) for view in d.views) <= 60 or reached
    arena = arena_of(game, tokenizer, limit=20)
    with pytest.raises(ValueError, match=r"model\.max_position = 20 is below the"):
        check_context(arena.engine, arena.contexts)


ENDLESS = """
    class Endless:
        def reset(self, seed): self.n = 0
        def told(self, side): return "say one word " * (40 if seed_is_long(self) else 1)
        def observe(self): return self.n % 2, "say one word" if self.n % 3 else ""
        def step(self, text): self.n += 1; return False
        def scores(self): raise AssertionError("it never ends")
        def script(self, side, rng): return "two words"

    def seed_is_long(game): return False
"""


@pytest.mark.parametrize("limit", range(60, 76))
def test_a_context_may_be_filled_to_the_last_place(tmp_path: Path, tokenizer: Tokenizer, limit: int) -> None:
    """What closes a turn has its place too, and an update takes all that was said."""
    arena = arena_of(game_of(written(tmp_path, ENDLESS)), tokenizer, limit=limit, max_rounds=40)
    scenarios = [arena.game.sample(random.Random(0), "train")]
    groups = arena.play(scenarios, group_size=4, seed=limit)
    dialogues = groups[0].dialogues
    assert {d.outcome.failure for d in dialogues if d.outcome} == {"context_full"}
    longest = max(len(view.token_ids) for d in dialogues for view in d.views)
    assert limit - 16 <= longest <= limit
    for i, d in enumerate(dialogues):
        d.reward = float(i), -float(i)
    rows, _ = grpo_rows(groups, GrpoSection(group_size=4, groups_per_step=1), RunningBaseline())
    how: Any = {"temperature": arena.rules.temperature, "max_tokens": 4096}
    assert accumulate_policy_gradient(arena.engine.model, rows, LossConfig(), **how).mismatch == 0


def test_a_script_that_outgrows_the_context_is_imitated_as_far_as_it_fits(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    script = game_of(written(tmp_path, ENDLESS)).scripted(random.Random(0))
    whole = demonstration_rows(script, tokenizer, 0)
    assert min(len(row.token_ids) for row in whole) > 400
    for limit in range(100, 130):
        for row, of_all in zip(demonstration_rows(script, tokenizer, 0, limit=limit), whole, strict=True):
            n = len(row.token_ids)
            assert limit - 24 <= n <= limit
            assert row.token_ids == of_all.token_ids[:n]
            assert row.loss_mask == of_all.loss_mask[:n]
            assert n == len(row.logprobs)
            ended = [i for i in range(n) if row.loss_mask[i] and not (i + 1 < n and row.loss_mask[i + 1])]
            assert all(row.token_ids[i] == tokenizer.chat.end_token_id for i in ended)  # of whole turns
    (tmp_path / "run").mkdir()
    named = [f"game.name={tmp_path / 'mine.py'}", "imitation.steps=2", "imitation.dialogues=8"]
    lengths = ["model.max_position=128", "train.steps=0", "dialogue.max_tokens_per_turn=8"]
    assert main(["train", "text-game", *SMALL, *named, *lengths, "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("of", ["opponent", "pool"])
def test_whoever_has_least_room_ends_a_game(tmp_path: Path, tokenizer: Tokenizer, of: str) -> None:
    game = game_of(written(tmp_path, ENDLESS))
    arena = arena_of(game, tokenizer, limit=128, max_rounds=40)
    opponent = None
    if of == "pool":
        arena = Arena(Engine(arena.engine.model, cache_tokens=64), tokenizer, game, arena.rules)
    else:
        small = decoder(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
        opponent = Opponent(role=1, name="small", engine=Engine(small, cache_tokens=4096))
    scenarios = [game.sample(random.Random(0), "train")]
    groups = arena.play(scenarios, group_size=2, seed=0, opponents=[opponent])
    for d in groups[0].dialogues:
        assert d.outcome is not None
        assert d.outcome.failure == "context_full"
        assert 40 < max(len(view.token_ids) for view in d.views) <= 64


def test_what_is_told_may_be_too_long_now_and_then(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = ENDLESS.replace("self.n = 0", "self.n, self.seed = 0, seed")
    text = text.replace(
        "def seed_is_long(game): return False", "def seed_is_long(game): return game.seed == 7"
    )
    game = game_of(written(tmp_path, text))
    arena = arena_of(game, tokenizer, limit=128, max_rounds=2)
    groups = arena.play([game.scenario(seed, "train") for seed in (6, 7)], group_size=2, seed=0)
    failures = [[d.outcome.failure for d in group.dialogues if d.outcome] for group in groups]
    assert failures == [["unfinished"] * 2, ["context_full"] * 2]
    assert all(not d.turns for d in groups[1].dialogues)
    assert arena.engine.pool.n_free == arena.engine.pool.n_pages


def test_held_out_seeds_are_others(tmp_path: Path) -> None:
    game = game_of(written(tmp_path, KUHN))
    seeds = {
        split: {game.sample(random.Random(i), split).data for i in range(300)}
        for split in ("train", "heldout")
    }
    assert not seeds["train"] & seeds["heldout"]
    assert min(map(len, seeds.values())) == 300
    with pytest.raises(ValueError, match="split = 'test': accepted is one of train, heldout"):
        game.sample(random.Random(0), "test")


@pytest.mark.parametrize("silent", [False, True])
def test_a_script_is_imitated_as_self_play_sees_it(
    tmp_path: Path, tokenizer: Tokenizer, silent: bool
) -> None:
    """The same moves, scripted and drawn, give the same contexts, also where a game says nothing of them."""
    text = KUHN.replace('self.said[-1] if self.said else ""', '""') if silent else KUHN
    game = game_of(written(tmp_path, text))
    by_moves = {(d.scenario.private_text, *moves(d)): d for d in played(arena_of(game, tokenizer), n=12)}
    compared = 0
    rng = random.Random(0)
    for i in range(60):
        script = game.scripted(rng)
        said = [text for _, text, kind in script.turns if kind == "utterance"]
        twin = by_moves.get((script.scenario.private_text, *said))
        if twin is not None:
            rows = demonstration_rows(script, tokenizer, i)
            assert [row.token_ids for row in rows] == [view.token_ids for view in twin.views]
            assert [row.loss_mask for row in rows] == [
                [kind == UTTERANCE for kind in view.kinds] for view in twin.views
            ]
            compared += 1
    assert compared > 10


# ---- what is wrong with a game -----------------------------------------------------------------------------

WHOLE = {
    "reset": "def reset(self, seed): pass",
    "observe": "def observe(self): return 0, 'say'",
    "step": "def step(self, text): return True",
    "scores": "def scores(self): return 0.0, 1.0",
}


def broken(folder: Path, **methods: str) -> Path:
    """A game whose `methods` are these; "" leaves one out."""
    lines = [line for line in {**WHOLE, **methods}.values() if line]
    return written(folder, "class Broken:\n" + "\n".join(f"    {line}" for line in lines))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"scores": ""}, r"the class Broken lacks scores\(\)"),
        ({"observe": "", "step": "step = 3"}, r"the class Broken lacks observe\(\), step\(\)"),
        (
            {"observe": "def observe(self): return 'say'"},
            r"observe\(\) gave 'say': accepted is a side, 0 or 1, and a text",
        ),
        ({"observe": "def observe(self): return 2, 'say'"}, r"observe\(\) gave \(2, 'say'\)"),
        ({"observe": "def observe(self): return 0, None"}, r"observe\(\) gave \(0, None\)"),
        ({"legal": "def legal(self): return []"}, r"legal\(\) gave \[\]: accepted is None or a list"),
        ({"legal": "def legal(self): return ['a', 'a']"}, r"legal\(\) gave \['a', 'a'\]"),
        ({"told": "def told(self, side): return side"}, r"told\(\) gave 0: accepted is a text"),
        (
            {"reset": "def reset(self, seed): seed / 0"},
            r"reset\(\) raised ZeroDivisionError: division by zero \(.*mine\.py, line 2\)",
        ),
        (
            {"reset": "def reset(self, seed): raise SystemExit(0)"},
            r"reset\(\) raised SystemExit: 0 \(.*mine\.py, line 2\)",
        ),
        (
            {"__init__": "def __init__(self, size): pass"},
            r"game\.options = \{\}: .*mine\.py does not take them: missing a required argument: 'size'",
        ),
    ],
)
def test_a_game_that_cannot_begin(tmp_path: Path, methods: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        game_of(broken(tmp_path, **methods))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"step": "def step(self, text): pass"}, r"step\(\) gave None: accepted is True or False"),
        ({"step": "def step(self, text): return self.board"}, r"no attribute 'board' \(.*mine\.py, line 4\)"),
        ({"scores": "def scores(self): return 1"}, r"scores\(\) gave 1: accepted is two finite numbers"),
        ({"scores": "def scores(self): return 1, float('nan')"}, r"scores\(\) gave \(1, nan\)"),
        ({"scores": "def scores(self): return 1, 10**400"}, r"scores\(\) gave \(1, 10000"),
        ({"summary": "def summary(self): return {'a b': 1}"}, r"summary\(\) gave \{'a b': 1\}"),
        ({"summary": "def summary(self): return {'moves': 1}"}, r"summary\(\) has 'moves': accepted is any"),
        ({"summary": "def summary(self): return {'step': 1}"}, r"summary\(\) has 'step': accepted is any"),
        ({"legal": "def legal(self): return [' a']"}, r"the legal move ' a' is read back as 'a'"),
        (
            {"legal": "def legal(self): return ['call call call call call']"},
            r"dialogue\.max_tokens_per_turn = 8: accepted is \d+ or more for the legal move 'call call",
        ),
    ],
)
def test_a_game_that_breaks(
    tmp_path: Path, tokenizer: Tokenizer, methods: dict[str, str], message: str
) -> None:
    game = game_of(broken(tmp_path, **methods))
    with pytest.raises((ValueError, RuntimeError), match=message):
        played(arena_of(game, tokenizer), n=1, group_size=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "accepted is 'mypackage.mymodule:MyGame', a path to a .py file, or 'textarena:NAME'"),
        ("nowhere.py", "there is no file"),
        ("mine.py:Mine", "mine.py has no class 'Mine'; its classes: One, Two"),
        ("mine.py", "classes with a game's methods: One, Two; accepted is a file with one, or mine.py:CLASS"),
        ("no.such.module:Game", "ModuleNotFoundError: No module named 'no'"),
        ("random:randint", "random has no class 'randint'"),
        ("random:", "accepted is 'mypackage"),
        ("worse.py", "SyntaxError: .*worse.py, line 1"),
        ("raises.py", r"KeyError: 'x' \(raises.py, line 2\)"),
    ],
)
def test_names_that_name_no_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "class One:\n    reset = 1\nclass Two:\n    step = 1\n")
    written(tmp_path, "class One", "worse.py")
    written(tmp_path, "a = {}\na['x']\n", "raises.py")
    with pytest.raises(ValueError, match=re.escape(f"game.name = {name!r}: ") + f".*{message}"):
        game_of(name)


def test_a_game_of_a_module_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file beside which another is imported."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "CARDS = 5", "sizes_of_kuhn.py")
    text = textwrap.dedent(KUHN).replace("cards=3", "cards=CARDS")
    written(tmp_path, "from sizes_of_kuhn import CARDS\n" + text, "kuhn_with_sizes.py")
    for name in ("kuhn_with_sizes:Kuhn", "./kuhn_with_sizes.py", "kuhn_with_sizes.py:Kuhn"):
        cards = {game_of(name).scenario(seed, "train").private_text[0][-1] for seed in range(60)}
        assert cards == set("01234")


# ---- as a configuration and from the command line ----------------------------------------------------------


def test_options_are_a_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[game]\nname = "a:B"\n[game.options]\ncards = 5\nnames = ["x", "y"]\ndeep = {a = 1.5}\n')
    overrides = ["game.options.cards=7", "game.options.word=two words", "game.options.on=true"]
    config = load_config(str(path), overrides)
    assert config.game.options == {  # type: ignore[attr-defined]
        "cards": 7,
        "names": ["x", "y"],
        "deep": {"a": 1.5},
        "word": "two words",
        "on": True,
    }
    written_again = tmp_path / "again.toml"
    written_again.write_text(config.to_toml())
    assert load_config(str(written_again)) == config
    assert main(["config", str(path), "game"]) == 0
    whole = load_config("text-game", ["game.name=a:B", "game.options={cards = 3}"])
    assert from_dict({"game": {"name": "a:B", "options": {"cards": 3}}}).game == whole.game
    for override, message in (
        ("game.options=3", r"game\.options = 3: accepted is a table"),
        ("game.option.cards=3", r"unknown key game\.option: did you mean 'options'"),
        ("train.seed.x=3", r"train\.seed = \{'x': 3\}: accepted is an integer"),
        ("dialogue.first_speaker=first", r"dialogue\.first_speaker = \"first\": accepted is its default"),
        ("dialogue.max_tokens_final=3", r"dialogue\.max_tokens_final = 3: accepted is its default"),
        ("game.objective=nash", r"accepted is one of 'selfish', 'cooperative'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("text-game", ["game.name=a:B", override])


def test_options_may_have_any_name(tmp_path: Path) -> None:
    text = WHOLE | {"__init__": "def __init__(self, method, function=1): self.way = method, function"}
    made = game_of(broken(tmp_path, **text), options={"method": "simple", "function": 2}).begin(0)
    assert made._game.way == ("simple", 2)


def test_a_line_has_no_name_that_a_game_may_give(tmp_path: Path) -> None:
    """What a run writes beside a game's measures is refused as a measure's name; and where no group teaches
    anything no entropy is known.
    """
    constant = broken(tmp_path, scores="def scores(self): return 1.0, 1.0")
    run = tmp_path / "run"
    more = [
        "train.steps=2",
        "eval.every=1",
        "grpo.resample=1",
        "opponent.kind=start",
        "model.max_position=128",
    ]
    words = ["train", "text-game", *SMALL, f"game.name={constant}", "dialogue.max_tokens_per_turn=6", *more]
    assert main([*words, "--run-dir", str(run)]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        own = {name for name in row if not name.startswith("failure_")} - MEASURES.keys()
        assert own <= TAKEN
        assert row["no_variance_share"] == 1
        assert "entropy" not in row
    assert main(["report", str(run)]) == 0


SMALL = [word for word in TINY if not word.startswith(("imitation", "dialogue"))]


def test_a_game_is_trained_measured_played_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [f"game.name={written(tmp_path, KUHN).name}", "dialogue.max_tokens_per_turn=6"]
    run = ["--run-dir", "run"]
    against = "opponent.kind=frozen"
    assert main(["train", "text-game", *SMALL, *named, *run, "--game.options.cards", "4", against]) == 0
    shown = capsys.readouterr().out
    assert "bets" in shown
    assert "score of side 1" in shown
    report = Path("run/report.html").read_text("utf-8")
    for text in ("your card is", "bets", "hears: bet", "mine.py, selfish"):
        assert text in report
    records = read_lines(tmp_path / "run" / "dialogues.jsonl")
    assert all(set(r["players"]) == {"policy", "start"} for r in records if r["stage"] == "selfplay")
    assert main(["eval", "run/checkpoints/warm_start", "--recipe", "run/config.toml"]) == 0
    assert "bets" in capsys.readouterr().out
    said = iter(["raise", "/private", "bet", "call", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["play", "run"]) == 0
    shown = capsys.readouterr().out
    assert "'raise' is not legal here: accepted is bet, check." in shown
    assert shown.count("your card is") >= 2
    assert re.search(r"You score -?[12], the policy -?[12]\.\nThe policy was told: your card is \d", shown)


def test_a_script_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy from nothing imitates the game's script; without one only self-play is left."""
    name = f"game.name={written(tmp_path, KUHN)}"
    run = ["--run-dir", str(tmp_path / "run")]
    words = ["train", "text-game", *SMALL, name, "imitation.steps=2", "imitation.dialogues=20"]
    assert main([*words, *run]) == 0
    stages = [row["stage"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert stages == ["imitation", "imitation", "selfplay", "selfplay"]
    unscripted = written(tmp_path, KUHN.replace("script", "nothing"), "other.py")
    assert main([*words, f"game.name={unscripted}", "--run-dir", str(tmp_path / "no")]) == 2
    assert "has no script() to imitate" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


# ---- TextArena ---------------------------------------------------------------------------------------------

HELD = Path(__file__).parent / "held_arena.py"
ARENA = {  # what is trained: the environment it is, and its options
    "textarena:KuhnPoker-v0": ("KuhnPoker-v0-raw", {}),
    "textarena:SimpleNegotiation-v0-short": ("SimpleNegotiation-v0-short-raw", {}),
    f"{HELD}:Kuhn": ("KuhnPoker-v0-raw", {"max_rounds": 2}),
    f"{HELD}:Negotiation": ("SimpleNegotiation-v0-short-raw", {}),
    f"{HELD}:TicTacToe": ("TicTacToe-v0-raw", {}),
}
BESIDE = ["grpo.group_size=3", "train.steps=3", "train.kl_every=0", "dialogue.max_tokens_per_turn=24"]
BESIDE += ["model.max_position=2048", "rollout.cache_tokens=32768", "game.objective=selfish"]


def needs_textarena() -> Any:
    return pytest.importorskip("textarena", reason="textarena is not installed")


def words_for(name: str) -> list[str]:
    options = [f"game.options.{key}={value}" for key, value in ARENA[name][1].items()]
    return ["text-game", *SMALL, *BESIDE, f"game.name={name}", *options]


def by_hand(record: dict[str, Any], name: str) -> tuple[dict[int, float], int, list[str]]:
    """The rewards of TextArena's environment for the moves of a record, how many were illegal, all that it
    said to who moved.
    """
    env = needs_textarena().make(ARENA[name][0], **ARENA[name][1])
    env.reset(num_players=2, seed=int(record["scenario"]["id"].rpartition("-")[2]))
    done, illegal, heard = False, 0, []
    for turn in record["turns"]:
        if turn["kind"] == "utterance":
            assert not done
            assert env.state.current_player_id == turn["role"]
            said = env.state.observations[turn["role"]]
            heard += [text for sender, text, _ in said if sender != turn["role"]]
            said.clear()
            logged = len(env.state.logs)
            done, _ = env.step(turn["text"])
            illegal += any("invalid move" in text for _, text in env.state.logs[logged:])
            illegal += env.state.game_info[turn["role"]]["invalid_move"]
    rewards, _ = env.close()
    return rewards, illegal, heard


@pytest.mark.parametrize("name", ARENA)
def test_a_game_of_textarena_trains_resumes_and_scores_as_it_does(name: str, tmp_path: Path) -> None:
    needs_textarena()
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert main(["train", *words_for(name), "--run-dir", str(whole)]) == 0
    records = read_lines(whole / "dialogues.jsonl")
    lengths = set()
    for record in records:
        rewards, illegal, heard = by_hand(record, name)
        assert record["reward"] == [rewards[0], rewards[1]] == record["outcome"]["scores"]
        assert record["outcome"]["metrics"]["illegal"] == illegal
        told = "\n".join(turn["text"] for turn in record["turns"] if turn["kind"] == "prompt")
        told += "".join(record["scenario"]["private"])
        assert all(text.strip() in told for text in heard)
        lengths.add(record["outcome"]["metrics"]["moves"])
    assert len(lengths) > 1 or "Negotiation" in name or name.startswith("textarena")
    if name.startswith(str(HELD)):
        killed_and_resumed(name, path) if name.endswith("Kuhn") else stopped_and_resumed(name, path)
        assert_same(whole, path)


def stopped_and_resumed(name: str, path: Path) -> None:
    """Two of three steps, then what is left by new objects, after draws of others."""
    config = load_config(words_for(name)[0], words_for(name)[1:])
    stop = threading.Event()

    class StopAfter(Progress):
        def update(self, step: int, metrics: Any) -> None:
            if step == 2:
                stop.set()

    run = RunDir.create(path, config.to_toml())
    with pytest.raises(Interrupted):
        train(config, run, StopAfter(quiet=True), stop)
    run.close()
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    train(config, RunDir.resume(path, config.to_toml()), Progress(quiet=True), threading.Event())


def killed_and_resumed(name: str, path: Path) -> None:
    """A process that is killed as soon as its first step of three is recorded."""
    program = "import sys; from duologue.grpo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", *words_for(name), "--run-dir", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_lines(path / "metrics.jsonl")) < 1 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert main([*command[3:], "--resume"]) == 0


def assert_same(a: Path, b: Path) -> None:
    last = "checkpoints/step_000003/model.safetensors"
    first, second = load_file(a / last), load_file(b / last)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines(a) == lines(b)
    assert read_lines(a / "dialogues.jsonl") == read_lines(b / "dialogues.jsonl")


def test_what_textarena_cannot_play(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_textarena()
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(nltk.data, "path", [])
    for name, message in (
        ("KuhnPoker", r"TextArena has no such environment; it has .*KuhnPoker-v0"),
        ("Wordle-v0", "needs lists of words that are downloaded; where there is a network, run python -m"),
        ("GuessTheNumber-v0", "no game for two: AssertionError: The number of players has to be 1"),
    ):
        with pytest.raises(ValueError, match=f"game.name = 'textarena:{name}'.*{message}"):
            game_of(f"textarena:{name}")
    with pytest.raises(ValueError, match=r"game\.options = \{'size': 3\}: .*unexpected keyword"):
        game_of("textarena:KuhnPoker-v0", options={"size": 3})
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(ValueError, match=r"textarena is needed: pip install 'duologue\[textarena\]'"):
        game_of("textarena:KuhnPoker-v0")


def test_a_file_with_another_game_in_it_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another place, as it was, it may be."""
    path = broken(tmp_path)
    command = ["train", "text-game", *SMALL, *BESIDE, "--run-dir", str(tmp_path / "run")]
    assert main([*command, f"game.name={path}", "train.steps=1"]) == 0
    moved = path.rename(path.with_name("elsewhere.py"))
    resumed = [*command, f"game.name={moved}", "--resume"]
    assert main([*resumed, "train.steps=2"]) == 0
    moved.write_text(moved.read_text("utf-8") + "# another\n", "utf-8")
    capsys.readouterr()
    assert main([*resumed, "train.steps=3"]) == 2
    assert "was started with " in (said := capsys.readouterr().err)
    assert "game.name" in said
