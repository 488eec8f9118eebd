"""Opponents: whom the policy meets, that only the policy's own tokens are trained, ratings and payoffs, and
exact resume.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_deliberation
import torch
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.cli import main
from duologue.grpo.config import Config, GrpoSection, load_config
from duologue.grpo.console import Progress
from duologue.grpo.held import HeldWeights
from duologue.grpo.loss import LossConfig
from duologue.grpo.opponents import Opponents, payoff_table, update_ratings
from duologue.grpo.policy import load_policy
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir, read_lines
from duologue.grpo.trainer import Trainer, train
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, save_model
from duologue.model.decoder import Decoder, score
from duologue.model.lora import LoraDecoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.dilemma import DilemmaGame, DilemmaSettings
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.selfplay.dialogue import KINDS, POLICY, Dialogue, Group, Turn, View, assign_rewards
from duologue.rollout.selfplay.speakers import Opponent, Speak, messages
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer, digest, serving
from tiny import RUN, dialogues, dying, lines, run_whole, selfplay, trained

SOME = [
    "grpo.train_kinds=['utterance','final']",
    "grpo.groups_per_step=4",
    "grpo.group_size=2",
    "grpo.learning_rate=0.02",
    "imitation.steps=2",
    "eval.dialogues=2",
    "train.steps=5",
    "train.kl_every=0",
    "grpo.imitation_coef=0.5",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from, as adapters need one."""
    path = tmp_path_factory.mktemp("start") / "run"
    run_whole(path, *SOME, "imitation.steps=8", "train.steps=0")
    return path / "checkpoints" / "step_000008"


def overrides(start: Path, lora: bool, *more: str) -> list[str]:
    onto = (
        [f"model.path={start}", "game.telling=plain", "imitation.steps=0", "lora.rank=4", "lora.alpha=64"]
        if lora
        else []
    )
    return [*RUN, *SOME, *onto, *more]


def config(start: Path, lora: bool, *more: str) -> Config:
    return load_config("deal", overrides(start, lora, *more))


# ---- runs of each kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
@pytest.mark.parametrize("kind", ["frozen", "lagged:2", "pool"])
def test_the_opponent_speaks_as_the_weights_it_is_named_after(
    start: Path, tmp_path: Path, kind: str, lora: bool
) -> None:
    """Every log-prob of a guest is that of the snapshot it is called by, as the training forward computes it;
    and not the policy's.
    """
    more = ["opponent.pool_every=1", "opponent.pool_size=3"] if kind == "pool" else []
    c = config(start, lora, f"opponent.kind={kind}", *more)
    trainer = trained(tmp_path / "run", c, keep_all=True)
    for row in selfplay(tmp_path / "run"):
        assert row["mismatch"] <= (0.0 if backend.available() else 1e-4)
    first, met = c.imitation.steps, Counter[tuple[int, str]]()
    models: dict[str, Decoder] = {}
    compared = apart = 0
    for d in dialogues(tmp_path / "run"):
        step = d["step"] - first
        assert sorted(d["players"]).count(POLICY) == 1
        guest = next(name for name in d["players"] if name != POLICY)
        met[step, guest] += 1
        if guest not in models:
            folder = (
                tmp_path / "run" / ("checkpoints/warm_start" if guest == "start" else f"opponents/{guest}")
            )
            models[guest] = load_model(folder)[0]
        role = d["players"].index(guest)
        ids, logprobs = said(trainer, d, role)
        for name, model in models.items():
            found = score(model, [ids])[0].detach()
            differ = sum(found[at - 1].item() != value for at, value in logprobs.items())
            if name == guest and backend.available():
                assert differ == 0
            apart += differ
            compared += len(logprobs)
    assert compared > 100
    assert apart > 50 or kind == "frozen"
    steps = {step: {name for s, name in met if s == step} for step in range(5)}
    if kind == "frozen":
        assert set(models) == {"start"}
    if kind == "lagged:2":
        assert steps == {0: {"start"}, 1: {"start"}, 2: {"start"}, 3: {"step_000001"}, 4: {"step_000002"}}
    if kind == "pool":
        assert steps[4] <= {"step_000001", "step_000002", "step_000003"}
        assert max(map(len, steps.values())) > 1 if lora else all(len(names) == 1 for names in steps.values())


def said(trainer: Trainer, d: dict[str, Any], role: int) -> tuple[list[int], dict[int, float]]:
    """The context of one side of a recorded dialogue, and the log-probs of what it said by position."""
    tokenizer = trainer.tokenizer
    chat = tokenizer.chat
    ids = chat.open(tokenizer.encode(d["scenario"]["private"][role]))
    logprobs: dict[int, float] = {}
    for turn in d["turns"]:
        stopped = turn["token_ids"][-1] in chat.stop_token_ids
        if turn["role"] == role:
            if turn["kind"] == "final":
                ids += chat.heard(tokenizer.encode(trainer.game.final_prompt))
            ids += chat.reply()
            logprobs |= {len(ids) + i: value for i, value in enumerate(turn["logprobs"])}
            ids += turn["token_ids"] + chat.close_reply(stopped)
        elif turn["kind"] == "utterance":
            ids += chat.heard(turn["token_ids"][:-1] if stopped else turn["token_ids"])
    return ids, logprobs


def test_the_frozen_partner_of_an_adapter_is_the_base_in_the_same_engine(start: Path, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", config(start, True, "opponent.kind=frozen"))
    assert isinstance(trainer.model, LoraDecoder)
    assert trainer.opponents.engines == [trainer.arena.engine]
    assert trainer.arena.engine.adapters == [trainer.model.adapter, None]
    assert not trainer.model.adapter.changes_nothing
    base, _ = load_model(start)
    for (name, kept), (_, now) in zip(
        base.named_parameters(), trainer.model.adapter_off.named_parameters(), strict=True
    ):
        assert torch.equal(kept, now), name


def test_a_frozen_partner_shares_the_weights_of_the_kl_reference(start: Path, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", config(start, False, "opponent.kind=frozen", "train.kl_every=1"))
    (own,) = trainer.opponents.held.engines
    assert own.model is trainer.reference


# ---- what is trained ---------------------------------------------------------------------------------------


def played(start: Path, tmp_path: Path, *more: str) -> tuple[Trainer, list[Group]]:
    c = config(start, True, "train.steps=3", *more)
    trainer = trained(tmp_path / "run", c)
    groups = trainer.play()
    return trainer, groups


@pytest.mark.parametrize("kind", ["frozen", "lagged:1"])
def test_the_opponents_tokens_have_no_gradient(start: Path, tmp_path: Path, kind: str) -> None:
    """Rows hold what the policy sampled and nothing else, and the gradient is that of autograd over just
    these tokens.
    """
    trainer, groups = played(start, tmp_path, f"opponent.kind={kind}")
    every = [d for group in groups for d in group.dialogues]
    for i, d in enumerate(every):
        d.reward = (float(i % 3), 1.0 - i % 2)
    rows, _ = grpo_rows(groups, trainer.config.grpo, RunningBaseline())
    assert len(rows) == len(every) == len({row.dialogue_id for row in rows})
    for row, d in zip(rows, every, strict=True):
        assert d.players[row.role] == POLICY
        spoken = [t for turn in d.turns if turn.role == row.role for t in turn.token_ids]
        assert [t for t, trained in zip(row.token_ids, row.loss_mask, strict=True) if trained] == spoken
        assert set(d.views[1 - row.role].kinds) == {KINDS.index("prompt")}
        assert {i for i, value in enumerate(d.views[1 - row.role].logprobs) if value} == set()
    assert {row.role for row in rows} == {0, 1}
    assert any(row.advantage for row in rows)
    model = trainer.model
    model.zero_grad(set_to_none=True)
    accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=500)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    total = sum(len(turn.token_ids) for d in every for turn in d.turns if d.players[turn.role] == POLICY)
    for row, d in zip(rows, every, strict=True):
        logp = score(model, [row.token_ids])[0]
        at, loss = 0, torch.zeros(())
        for turn in (t for t in d.turns if t.role == row.role):
            at = find(row.token_ids, turn.token_ids, at)
            part = logp[at - 1 : at - 1 + len(turn.token_ids)]
            loss = loss - row.advantage * torch.exp(part - part.detach()).sum() / total
            at += len(turn.token_ids)
        torch.autograd.backward(loss)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    if kind == "lagged:1":
        other = trainer.arena.engine.adapters[2]  # behind the base with none
        assert other is not None
        assert all(p.grad is None for p in other.parameters())


def find(ids: list[int], part: list[int], start: int) -> int:
    return next(i for i in range(start, len(ids)) if ids[i : i + len(part)] == part)


def test_the_policy_is_on_both_sides_in_turn_or_on_the_first(start: Path, tmp_path: Path) -> None:
    both = trained(tmp_path / "both", config(start, True, "opponent.kind=frozen", "train.steps=4"))
    at = both.opponents
    sides = [[guest.role for guest in at.of_groups(step, 0) if guest is not None] for step in range(4)]
    assert sides == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    trained(
        tmp_path / "first",
        config(start, True, "opponent.kind=frozen", "grpo.train_roles=first", "train.steps=2"),
    )
    assert {tuple(d["players"]) for d in dialogues(tmp_path / "first")} == {(POLICY, "start")}


# ---- draws -------------------------------------------------------------------------------------------------


def bare(start: Path, tmp_path: Path, *more: str) -> Opponents:
    c = config(start, True, "opponent.kind=pool", *more)
    opponents = Opponents.__new__(Opponents)
    opponents.config, opponents.folder, opponents.ratings = c, tmp_path, {POLICY: 1000.0}
    return opponents


def test_members_of_a_pool(start: Path, tmp_path: Path) -> None:
    pool = bare(start, tmp_path, "opponent.pool_every=3", "opponent.pool_size=2")
    assert [pool.members(step) for step in (0, 1, 3, 4, 6, 7, 10)] == [
        [0],
        [0],
        [0],
        [0, 3],
        [0, 3],
        [3, 6],
        [6, 9],
    ]
    lagged = bare(start, tmp_path, "opponent.kind=lagged:4", "opponent.pool_every=10")
    assert [lagged.members(step) for step in (0, 3, 4, 5, 9)] == [[0], [0], [0], [1], [5]]


@pytest.mark.parametrize(
    ("draw", "shares"), [("uniform", (1 / 3, 1 / 3, 1 / 3)), ("recent", (1 / 6, 2 / 6, 3 / 6))]
)
def test_draws_follow_the_seed_and_have_their_shares(
    start: Path, tmp_path: Path, draw: str, shares: tuple[float, ...]
) -> None:
    more = ("opponent.pool_every=1", "opponent.pool_size=3", f"opponent.pool_draw={draw}", "train.steps=4")
    trainer = trained(
        tmp_path / "run", config(start, True, "opponent.kind=pool", "train.save_every=100", *more)
    )
    found = Counter(
        g.name for seed in range(400) for g in trainer.opponents.of_groups(4, seed) if g is not None
    )
    total = sum(found.values())
    for step, share in zip((1, 2, 3), shares, strict=True):
        assert found[f"step_{step:06d}"] / total == pytest.approx(share, abs=0.05)
    names = [[g.name for g in trainer.opponents.of_groups(4, seed) if g is not None] for seed in (5, 6, 5)]
    assert names[0] == names[2] != names[1]


# ---- ratings and payoffs -----------------------------------------------------------------------------------


def test_ratings_by_hand() -> None:
    ratings = {POLICY: 1000.0}
    update_ratings(ratings, {"start": 0.75})  # expected 0.5: 32 * 0.25
    assert ratings == {POLICY: 1008.0, "start": 992.0}
    ratings = {POLICY: 1400.0, "a": 1000.0}  # 400 points are ten to one: expected 10 / 11
    update_ratings(ratings, {"a": 0.0})
    assert ratings[POLICY] == pytest.approx(1400 - 320 / 11)
    assert ratings["a"] == pytest.approx(1000 + 320 / 11)
    ratings = {POLICY: 1000.0, "a": 1000.0}
    update_ratings(ratings, {"a": 1.0, "new": 0.0})  # both expected 0.5 by the ratings before
    assert ratings == {POLICY: 1000.0, "a": 984.0, "new": 1016.0}


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(500, 1500), max_size=4),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1), min_size=1, max_size=4),
)
def test_ratings_move_towards_the_results_and_keep_their_sum(
    others: dict[str, float], scores: dict[str, float]
) -> None:
    ratings = {POLICY: 1000.0, **others}
    known = dict(ratings) | {name: 1000.0 for name in scores if name not in ratings}
    update_ratings(ratings, scores)
    assert sum(ratings.values()) == pytest.approx(sum(known.values()))
    assert {name for name in known if ratings[name] != known[name]} <= {POLICY, *scores}
    for name, value in scores.items():
        expected = 1 / (1 + 10 ** ((known[name] - 1000) / 400))
        assert (ratings[name] - known[name]) * (value - expected) <= 0
    again = {POLICY: 1000.0, **others}
    update_ratings(again, dict(reversed(scores.items())))
    assert again == ratings


def test_repeated_matches_bring_the_rating_that_elo_defines() -> None:
    ratings = {POLICY: 1000.0, "a": 1000.0}
    for _ in range(500):
        update_ratings(ratings, {"a": 0.8})
    assert ratings[POLICY] - ratings["a"] == pytest.approx(400 * 0.60206, abs=0.01)  # 400 log10(0.8 / 0.2)


def dialogue(
    players: tuple[str, str], scores: tuple[float, float], reward: tuple[float, float] | None
) -> Dialogue:
    scenario = Scenario(game="deal", id="x", split="train", private_text=("", ""), data=None)
    return Dialogue(
        scenario=scenario,
        first_speaker=0,
        turns=[],
        views=(View(), View()),
        players=players,
        reward=reward,
        outcome=Outcome(agreed=True, scores=scores) if reward else None,
    )


def test_payoffs_by_hand() -> None:
    found = [
        dialogue((POLICY, "a"), (7.0, 3.0), (0.7, 0.3)),
        dialogue(("a", POLICY), (6.0, 4.0), (0.6, 0.4)),
        dialogue(("a", POLICY), (5.0, 5.0), (0.5, 0.5)),
        dialogue(("a", POLICY), (1.0, 9.0), (0.1, 0.9)),
        dialogue(("b", POLICY), (9.0, 1.0), (0.9, 0.1)),
        dialogue((POLICY, "b"), (0.0, 0.0), None),  # unscored
        dialogue((POLICY, POLICY), (4.0, 4.0), (0.4, 0.4)),
    ]
    table = payoff_table([Group(scenario=found[0].scenario, dialogues=found)])
    assert set(table) == {"a", "b"}
    row = {"dialogues": 4, "policy": 2.5 / 4, "opponent": 1.5 / 4, "score": 2.5 / 4}
    points = {"policy_points": 25 / 4, "opponent_points": 15 / 4}
    assert table["a"] == pytest.approx({**row, **points, "agreement": 1.0})
    row = {"dialogues": 1, "policy": 0.1, "opponent": 0.9, "score": 0.0}
    assert table["b"] == pytest.approx({**row, "policy_points": 1, "opponent_points": 9, "agreement": 1.0})


def test_metrics_follow_from_the_dialogues(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: DealGame, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        return Outcome(
            agreed=False, scores=(float(draws.randrange(4)), float(draws.randrange(4))), failure="no_close"
        )

    draws = random.Random(0)
    monkeypatch.setattr(DealGame, "judge", judge)
    monkeypatch.setattr(
        DealGame, "rewards", lambda self, scenario, outcome: tuple(x / 10 for x in outcome.scores)
    )
    trained(tmp_path / "run", config(start, True, "opponent.kind=frozen", "game.objective=selfish"))
    ratings = {POLICY: 1000.0, "start": 1000.0}
    for row in selfplay(tmp_path / "run"):
        here = [d for d in dialogues(tmp_path / "run") if d["step"] == row["step"]]
        sides = [d["players"].index(POLICY) for d in here]
        own = [
            (d["reward"][i], d["outcome"]["scores"][:: -1 if i else 1])
            for i, d in zip(sides, here, strict=True)
        ]
        assert row["payoff"]["start"]["dialogues"] == len(here) == 8
        assert row["payoff"]["start"]["policy"] == pytest.approx(sum(reward for reward, _ in own) / 8)
        result = sum((mine > theirs) + 0.5 * (mine == theirs) for _, (mine, theirs) in own) / 8
        update_ratings(ratings, {"start": result})
        assert row["elo"] == pytest.approx(ratings)
    assert ratings[POLICY] != 1000


def test_self_play_has_no_table(start: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", config(start, False, "train.steps=1"))
    assert not {"payoff", "elo"} & selfplay(tmp_path / "run")[0].keys()
    assert all(d["players"] == [POLICY, POLICY] for d in dialogues(tmp_path / "run"))


# ---- a server ----------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving() as found:
        # type: ignore[assignment,return-value]
        found.answer = lambda prompt: "I take the hats, you: the rest. " * (1 + digest(prompt)[0] % 4)
        yield found


def remote(start: Path, server: JudgeServer, *more: str) -> Config:
    return config(
        start,
        False,
        "opponent.kind=endpoint",
        f"opponent.url={server.url}",
        "opponent.model=other",
        "train.steps=2",
        *more,
    )


def test_a_server_hears_texts_and_its_words_are_kept_as_ids(
    start: Path, tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOGUE_OPPONENT_KEY", "sesame")
    trainer = trained(
        tmp_path / "run", remote(start, server, "dialogue.max_tokens_per_turn=30", "model.max_position=640")
    )
    tokenizer = trainer.tokenizer
    asked: dict[str, int] = Counter(json.dumps(body["messages"]) for body in server.requests)
    cut = 0
    for d in dialogues(tmp_path / "run"):
        role = d["players"].index("endpoint")
        assert d["players"][1 - role] == POLICY
        turns = [Turn(**turn) for turn in d["turns"]]
        for i, turn in enumerate(turns):
            assert (turn.logprobs is None) == (turn.role == role)
            if turn.role != role:
                continue
            question = trainer.game.final_prompt if turn.kind == "final" else ""
            heard = messages(d["scenario"]["private"][role], turns[:i], role, question)
            assert json.dumps(heard) in asked
            # type: ignore[arg-type]
            answer = tokenizer.encode(json.dumps(server.answer(heard[0]["content"])).strip())
            limit = 8 if turn.kind == "final" else 30
            assert turn.token_ids == (
                [*answer, tokenizer.chat.end_token_id] if len(answer) < limit else answer[:limit]
            )
            cut += len(answer) >= limit
    assert cut > 0
    for body, head in zip(server.requests, server.heads, strict=True):
        assert head["Authorization"] == "Bearer sesame"
        assert body.keys() == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", body["max_tokens"], 1.0)
    assert "sesame" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "run").glob("*.*"))
    for row in selfplay(tmp_path / "run"):
        assert row["payoff"].keys() == {"endpoint"}
        assert row["mismatch"] <= (0.0 if backend.available() else 1e-4)


def test_messages_alternate_and_hold_what_a_side_knows() -> None:
    def turn(role: int, text: str, kind: str = "utterance") -> Turn:
        return Turn(role=role, kind=kind, text=text, token_ids=[], logprobs=None)

    turns = [turn(1, "a"), turn(0, "b"), turn(1, "c"), turn(1, "hidden", "final")]
    system = {"role": "system", "content": "mine"}
    assert messages("mine", turns, 0, "so?") == [
        system,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n\nso?"},
    ]
    said = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    opens = {"role": "user", "content": "The talk goes on."}
    assert messages("mine", turns, 1, "so?") == [system, opens, *said, {"role": "user", "content": "so?"}]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_strict_template_takes_what_an_opponent_is_sent(first: int, n: int) -> None:
    """Some render nothing but a user's message and an assistant's in turns after the system's, and want a
    user's before they answer.
    """
    import jinja2

    strict = jinja2.Environment(autoescape=False).from_string(
        "{%- for m in messages[1:] %}{% set due = 'user' if loop.index0 % 2 == 0 else 'assistant' %}"
        "{%- if m.role != due or not m.content %}{{ raise('roles must alternate') }}{% endif %}"
        "{%- endfor %}{% if messages[-1].role != 'user' %}{{ raise('no user query') }}{% endif %}"
    )

    def refuse(why: str) -> None:
        raise AssertionError(why)

    sides = [(first + i) % 2 for i in range(n)]
    turns = [Turn(role=s, kind="utterance", text="words", token_ids=[], logprobs=None) for s in sides]
    strict.render(messages=messages("mine", turns, (first + n) % 2), **{"raise": refuse})


def test_a_lost_answer_leaves_its_dialogue_unscored(start: Path, tmp_path: Path, server: JudgeServer) -> None:
    lost = {3, 8}
    server.fault = lambda n, prompt: "401" if n in lost else None
    trained(tmp_path / "run", remote(start, server, "judge.max_unscored_share=0.5", "train.steps=1"))
    (row,) = selfplay(tmp_path / "run")
    found = dialogues(tmp_path / "run")
    unscored = [d for d in found if d["reward"] is None]
    assert len(unscored) == row["unscored"] == 2
    assert all(d["outcome"] is None and d["advantage"] is None for d in unscored)
    assert row["dialogues"] == row["payoff"]["endpoint"]["dialogues"] == len(found) - 2


def test_a_server_that_is_down_stops_the_run_which_then_goes_on(
    start: Path, tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line; and the run that went on is the run that never broke, with nothing asked
    again that was answered.
    """
    words = ["opponent.kind=endpoint", f"opponent.url={server.url}", "opponent.deadline_s=5", "train.steps=3"]
    command = ["train", "deal", *overrides(start, False, *words), "--run-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    asked = len(server.requests)
    server.requests.clear()
    server.fault = lambda n, prompt: "401" if n >= asked // 2 else None
    capsys.readouterr()
    assert main([*command, str(tmp_path / "broken")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the opponent's server failed" in error
    assert "HTTP 401" in error
    server.fault = lambda n, prompt: None
    kept = (
        sqlite3.connect(tmp_path / "broken" / "opponent.sqlite")
        .execute("SELECT count(*) FROM answers")
        .fetchone()[0]
    )
    assert asked // 2 - 8 <= kept <= asked // 2  # what was on its way as the run ended is lost
    before = len(server.requests)
    assert main([*command, str(tmp_path / "broken"), "--resume"]) == 0
    assert len(server.requests) - before == asked - kept
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert read_lines(tmp_path / "whole" / "dialogues.jsonl") == read_lines(
        tmp_path / "broken" / "dialogues.jsonl"
    )


# ---- dilemmas ----------------------------------------------------------------------------------------------


class Mumbler:
    """A server that gives every answer after the second look, and none to what `lost` names by its number."""

    who = "the mumbler"
    max_unscored_share = 0.5
    last_fault = "it said nothing"

    def __init__(self, lost: set[int]) -> None:
        self.lost, self.waiting, self.asked = lost, [], []

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def open(self, token_ids: list[int], adapter: int = 0) -> None:
        return None

    def ask(self, turn: Speak) -> None:
        self.asked.append(messages(turn.told, turn.heard, turn.role, turn.question))
        self.waiting.append([2, len(self.asked), turn])

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        for entry in self.waiting:
            entry[0] -= 1
        found = [(turn, self.says(n)) for left, n, turn in self.waiting if left <= 0]
        self.waiting = [entry for entry in self.waiting if entry[0] > 0]
        return found

    def says(self, n: int) -> Completion | None:
        return None if n in self.lost else Completion(token_ids=[40 + n % 7, 41, 42])

    def close(self) -> None:
        return


def dilemmas(tokenizer: Tokenizer, path: Path, context: str) -> test_deliberation.Table:
    rows = {"dilemmas": [{"id": "d1", "text": "who pays?"}], "personas": [test_deliberation.ONE], "tasks": []}
    rows["tasks"] = [{**test_deliberation.ONE, "id": "t1", "text": "buy or not?"}]
    for key, found in rows.items():
        (path / f"{key}.jsonl").write_text("\n".join(map(json.dumps, found)))
    game = DilemmaGame(DilemmaSettings(**{key: str(path / f"{key}.jsonl") for key in rows}))
    return test_deliberation.Table(game, tokenizer, path / "ledger.sqlite", context=context)


@pytest.mark.parametrize("context", ["full", "last_2"])
@pytest.mark.parametrize("who", ["engine", "server"])
def test_a_guest_takes_part_in_deliberations_and_the_policy_writes(
    tiny_tokenizer: Tokenizer, tmp_path: Path, context: str, who: str
) -> None:
    here = dilemmas(tiny_tokenizer, tmp_path, context)
    other = test_deliberation.decoder(tiny_tokenizer)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    engine = Engine(other, cache_tokens=16384) if who == "engine" else None
    server = Mumbler({5})
    here.arena.speakers.outside = server
    rng = random.Random(1)
    opponents = [
        Opponent(role=0, name="guest", engine=engine),
        None,
        Opponent(role=1, name="guest", engine=engine),
    ]
    groups = here.arena.play(
        [here.game.sample(rng, "train") for _ in range(3)], group_size=4, seed=5, opponents=opponents
    )
    assign_rewards(here.game, [d for group in groups for d in group.dialogues])
    assert not here.engine._branches
    assert engine is None or not engine._branches
    finals = 0
    for group, opponent in zip(groups, opponents, strict=True):
        for d in group.dialogues:
            assert (
                d.players
                == {0: ("guest", POLICY), None: (POLICY, POLICY), 1: (POLICY, "guest")}[
                    opponent and opponent.role
                ]
            )
            own = [i for i in (0, 1) if d.players[i] == POLICY]
            finals += sum(turn.kind == "final" for turn in d.turns)
            assert all(turn.role == own[0] for turn in d.turns if turn.kind == "final")
            for role in (0, 1):
                views = [view for view, of in zip(d.views, d.view_roles, strict=True) if of == role]
                marked = [t for v in views for t, kind in zip(v.token_ids, v.kinds, strict=True) if kind]
                spoken = [t for turn in d.turns if turn.role == role for t in turn.token_ids]
                assert sorted(marked) == (sorted(spoken) if role in own else [])
                assert all(
                    (turn.logprobs is None) == (who == "server" and role not in own)
                    for turn in d.turns
                    if turn.role == role
                )
    assert finals > 0
    unscored = [
        d
        for group in groups
        for d in group.dialogues
        if d.outcome is not None and d.outcome.failure == "unscored"
    ]
    assert len(unscored) == (who == "server")
    rows, stats = grpo_rows(groups, GrpoSection(), RunningBaseline())
    every = [d for group in groups for d in group.dialogues]
    assert all(every[row.dialogue_id].players[row.role] == POLICY for row in rows)
    assert stats["unscored"] == len(unscored)
    if who == "server":
        shared = [talk[0]["content"] for talk in server.asked]
        assert all("who pays?" in text and ("Ada" in text or "Bo" in text) for text in shared)
        longest = max(len(talk) for talk in server.asked)
        assert longest > 4 if context == "full" else longest <= 4


# ---- resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "kind", "every"),
    [
        (True, "pool", 2),
        (False, "pool", 2),
        (True, "lagged:2", 3),
        (False, "lagged:1", 2),
        (True, "frozen", 2),
    ],
)
@pytest.mark.parametrize("after", [3])
def test_resume_is_exact(start: Path, tmp_path: Path, lora: bool, kind: str, every: int, after: int) -> None:
    """Stopped in self-play at a step that is no multiple of save_every, gone on with in new objects: the same
    run.
    """
    more = ["opponent.pool_every=2", "opponent.pool_size=2"] if kind == "pool" else []
    c = config(start, lora, f"opponent.kind={kind}", f"train.save_every={every}", *more)
    trained(tmp_path / "whole", c)
    stop = threading.Event()

    class StopAfter(Progress):
        seen = 0

        def update(self, step: int, metrics: Any) -> None:
            self.seen += metrics["stage"] == "selfplay"
            if self.seen == after:
                stop.set()

    first = RunDir.create(tmp_path / "run", c.to_toml())
    with pytest.raises(Interrupted):
        train(c, first, StopAfter(quiet=True), stop)
    first.close()
    train(c, RunDir.resume(tmp_path / "run", c.to_toml()), Progress(quiet=True), threading.Event())
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert read_lines(tmp_path / "whole" / "dialogues.jsonl") == read_lines(
        tmp_path / "run" / "dialogues.jsonl"
    )
    assert kept(tmp_path / "whole") == kept(tmp_path / "run")


def test_kill_9_and_resume_is_exact(start: Path, tmp_path: Path) -> None:
    """The command, killed in self-play between two snapshots and after the last checkpoint."""
    words = ["opponent.kind=pool", "opponent.pool_every=2", "opponent.pool_size=2", "train.save_every=3"]
    command = ["train", "deal", *overrides(start, True, *words), "--run-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    path = tmp_path / "run"
    killed = subprocess.run([*dying(4), *command, str(path)], stdout=subprocess.DEVNULL, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert main([*command, str(path), "--resume"]) == 0
    assert lines(tmp_path / "whole") == lines(path)
    assert read_lines(tmp_path / "whole" / "dialogues.jsonl") == read_lines(path / "dialogues.jsonl")
    assert kept(tmp_path / "whole") == kept(path)


@pytest.mark.parametrize("kind", ["lagged:1", "pool"])
def test_the_base_of_adapters_may_move_between_snapshots(start: Path, tmp_path: Path, kind: str) -> None:
    """Those before say where it was; their values are written over all the same."""
    words = [f"opponent.kind={kind}", "train.save_every=1", "grpo.imitation_coef=1"]
    words += ["opponent.pool_every=1"] if kind == "pool" else []
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(start, here)
    command = ["train", "deal", *overrides(here, True, *words, "train.steps=3"), "--run-dir"]
    whole = ["train", "deal", *overrides(here, True, *words, "train.steps=6"), "--run-dir"]
    assert main([*whole, str(tmp_path / "whole")]) == 0
    assert main([*command, str(tmp_path / "run")]) == 0
    here.rename(there)
    more = [f"model.path={there}", "train.steps=6", "--resume"]
    assert main([*command, str(tmp_path / "run"), *more]) == 0
    assert lines(tmp_path / "whole")[3:] == lines(tmp_path / "run")[3:]


def test_weights_of_forgotten_snapshots_are_written_over(start: Path, tmp_path: Path) -> None:
    """After a rollback no engine is left behind, with its weights and its pool, for another to be made."""
    model, tokenizer = load_model(start)
    for step in range(1, 6):
        with torch.no_grad():
            model.head_weight.mul_(1.1)
        save_model(model, tokenizer, tmp_path / str(step))
    held = HeldWeights(config(start, False), model, 3)
    first = held.use({step: tmp_path / str(step) for step in (1, 2, 3)})
    held.forget_after(2)
    held.forget_after(1)
    then = held.use({step: tmp_path / str(step) for step in (1, 4, 5)})
    assert {*then.values()} == {*first.values()}
    assert then[1] is first[1]
    for step, engine in then.items():
        assert torch.equal(engine.model.head_weight, load_model(tmp_path / str(step))[0].head_weight)


def test_a_frozen_adapter_of_other_weights_plays_on_those(start: Path, tmp_path: Path) -> None:
    """Where they are gone, on the run's base."""
    model, tokenizer = load_model(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    other = tmp_path / "other"
    save_model(model, tokenizer, other)
    trained(tmp_path / "theirs", config(other, True, "train.steps=1"))
    adapter = tmp_path / "theirs" / "checkpoints" / "step_000001"
    c = config(start, True, "opponent.kind=frozen", f"opponent.path={adapter}")
    for base, expected in ((other, other), (None, start)):
        if base is None:
            other.rename(tmp_path / "gone")
        found, _ = load_policy(adapter, c)
        exact = load_model(expected if base is None else other)[0]
        assert torch.equal(found.head_weight, exact.head_weight)
        assert torch.equal(load_policy(adapter, c, own=True)[0].head_weight, load_model(start)[0].head_weight)


def kept(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "opponents").glob("*"))


def test_snapshots_that_nobody_can_meet_are_dropped(start: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", config(start, True, "opponent.kind=lagged:2", "train.save_every=2"))
    # The checkpoint before the last, after 4 steps, is kept too, and a step from there meets the second.
    assert kept(tmp_path / "run") == ["step_000002", "step_000003", "step_000004", "step_000005"]
    assert (tmp_path / "run/opponents/step_000005/adapter_model.safetensors").is_file()


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["opponent.kind=lagged"],
            r"opponent\.kind = \"lagged\": accepted is 'self', 'frozen', 'lagged:k' with k of 1 or more",
        ),
        (["opponent.kind=lagged:0"], r"opponent\.kind = \"lagged:0\": accepted is"),
        (
            ["opponent.pool_size=3"],
            r"opponent\.pool_size = 3: accepted is its default where opponent\.kind is not 'pool'",
        ),
        (["opponent.kind=pool", "opponent.pool_size=0"], r"opponent\.pool_size = 0: accepted is 1 or more"),
        (
            ["opponent.kind=pool", "opponent.pool_draw=often"],
            r"opponent\.pool_draw = \"often\": accepted is 'uniform' or 'recent'",
        ),
        (["opponent.kind=endpoint"], r"opponent\.url = \"\": accepted is an address that begins with http"),
        (
            ["opponent.kind=endpoint", "opponent.url=http://me:pw@here/v1"],
            r"opponent\.url = .* no credential",
        ),
        (
            ["opponent.kind=frozen", "opponent.url=http://here/v1"],
            r"opponent\.url = .*: accepted is its default where",
        ),
    ],
)
def test_settings_are_checked(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("deal", settings)
