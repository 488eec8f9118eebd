"""Mixed company: shares are met, whoever is met speaks as the weights or the character it is named after,
several sets of weights are held at once, and a run that is killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.commands.report import gather, write_report
from duologue.grpo.config import from_dict, load_config
from duologue.grpo.console import Progress
from duologue.grpo.held import HeldWeights
from duologue.grpo.mix import chosen, places
from duologue.grpo.opponents import update_ratings
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.trainer import Trainer
from duologue.grpo.world import ALONE
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, save_model
from duologue.model.decoder import Decoder, score
from duologue.model.lora import LoraDecoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.catalogue import GAMES
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import POLICY
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Opponent
from hypothesis import given, settings
from hypothesis import strategies as st
from test_opponents import Mumbler, said
from test_world import together
from tiny import RUN, decoder, dialogues, dying, lines, run_whole, selfplay, trained

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import exploit

SHARES = {"self": 0.25, "start": 0.125, "pool": 0.25, "lagged:1": 0.125, "frozen": 0.125, "scripted": 0.125}
MIX = f"opponent.mix={{{', '.join(f'{json.dumps(name)} = {part}' for name, part in SHARES.items())}}}"
SOME = [
    "grpo.groups_per_step=9",
    "grpo.group_size=2",
    "grpo.learning_rate=0.02",
    "eval.dialogues=2",
    "train.steps=5",
    "train.save_every=3",
    "train.kl_every=0",
    "opponent.kind=mix",
    "opponent.pool_every=2",
    "opponent.pool_size=2",
    MIX,
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from."""
    path = tmp_path_factory.mktemp("start") / "run"
    run_whole(path, "imitation.steps=8", "train.steps=0", "eval.dialogues=2")
    return path / "checkpoints" / "step_000008"


@pytest.fixture(scope="module")
def smaller(start: Path) -> Path:
    """Another decoder, with the same tokenizer."""
    tokenizer = Tokenizer.from_dir(start)
    model = decoder(3, vocab_size=tokenizer.vocab_size, num_layers=1, max_position_embeddings=400)
    save_model(model, tokenizer, start.parent / "smaller")
    return start.parent / "smaller"


def overrides(start: Path, smaller: Path, *more: str, lora: bool = False) -> list[str]:
    adapter = ["lora.rank=4", "lora.alpha=64"] if lora else []
    here = [
        f"model.path={start}",
        "game.telling=plain",
        f"opponent.path={smaller}",
        "imitation.steps=0",
        *adapter,
    ]
    return [*RUN, *SOME, *here, *more]


def partner(d: dict[str, Any]) -> str:
    return next((name for name in d["players"] if name != POLICY), "self")


# ---- draws -------------------------------------------------------------------------------------------------

PARTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 1), min_size=1).map(
    lambda weights: {name: weight / sum(weights.values()) for name, weight in weights.items()}
)


@given(PARTS, st.integers(1, 64), st.integers(0, 2**40))
def test_a_step_meets_the_shares_as_closely_as_groups_can(
    parts: dict[str, float], groups: int, seed: int
) -> None:
    drawn = places(parts, groups, seed)
    assert drawn == places(parts, groups, seed)
    counts = Counter(place.partner for place in drawn)
    for name, part in parts.items():
        assert math.floor(part * groups - 1e-9) <= counts[name] <= math.ceil(part * groups + 1e-9)
    assert all(0 <= place.at < 1 for place in drawn)


def test_over_the_steps_every_group_meets_everybody_by_the_shares() -> None:
    """Each group alone, and within a share each place: a chi-square far below what a bias would bring."""
    parts, n = {"a": 0.1, "b": 0.25, "c": 0.65}, 4000
    steps = [places(parts, 4, seed) for seed in range(n)]
    for group in range(4):
        counts = Counter(step[group].partner for step in steps)
        chi = sum((counts[name] - n * part) ** 2 / (n * part) for name, part in parts.items())
        assert chi < 16  # two degrees of freedom: 0.03 % lie above
    for name in parts:
        at = [chosen(range(5), place.at) for step in steps for place in step if place.partner == name]
        counts_at = Counter(at)
        assert sum((counts_at[i] - len(at) / 5) ** 2 / (len(at) / 5) for i in range(5)) < 24


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_everybody_speaks_as_the_weights_it_is_named_after(
    start: Path, smaller: Path, tmp_path: Path, lora: bool
) -> None:
    path = tmp_path / "run"
    c = load_config("deal", overrides(start, smaller, lora=lora))
    trainer = trained(path, c, keep_all=True)
    folders = {"start": "checkpoints/warm_start", "frozen": str(smaller)}
    models: dict[str, Decoder] = {}
    met: dict[int, set[str]] = {}
    compared = 0
    for d in dialogues(path):
        name = partner(d)
        if name == "self":
            assert d["players"] == [POLICY, POLICY]
            continue
        role = d["players"].index(name)
        if name.startswith("scripted:"):
            assert all((turn["logprobs"] is None) == (turn["role"] == role) for turn in d["turns"])
            continue
        met.setdefault(d["step"], set()).add(name)
        if name not in models:
            models[name] = load_model(path / folders.get(name, f"opponents/{name}"))[0]
        ids, logprobs = said(trainer, d, role)
        found = score(models[name], [ids])[0].detach()
        differ = [abs(found[at - 1].item() - value) for at, value in logprobs.items()]
        assert max(differ) <= (0.0 if backend.available() else 1e-4), name
        compared += len(differ)
    assert compared > 200
    assert {"start", "frozen"} < models.keys()
    assert len(models) > 4
    sets = max(len(names - {"frozen"}) for names in met.values())
    assert sets == 3
    adapters = isinstance(trainer.model, LoraDecoder)
    assert len(trainer.opponents.engines) == (2 if adapters else 5)  # the policy's, frozen, and three others
    assert trainer.opponents.held.most == (0 if adapters else 3)


def test_the_least_recently_used_weights_are_written_over(start: Path, tmp_path: Path) -> None:
    config, (model, tokenizer) = load_config("deal", RUN), load_model(start)
    paths = {}
    for step in range(6):
        model.load_state_dict(load_model(start)[0].state_dict())
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        save_model(model, tokenizer, tmp_path / str(step))
        paths[step] = tmp_path / str(step)
    held, rng = HeldWeights(config, model, 3), random.Random(0)
    oracle: OrderedDict[int, Engine] = OrderedDict()
    engines: set[int] = set()
    for _ in range(30):
        wanted = sorted(rng.sample(range(6), rng.randint(1, 3)))
        for step in wanted:
            if step in oracle:
                oracle.move_to_end(step)
        gone = len(oracle.keys() | {*wanted}) - 3
        for step in [*oracle][: max(gone, 0)]:
            del oracle[step]
        found = held.use({step: paths[step] for step in wanted})
        assert all(found[step] is engine for step, engine in oracle.items() if step in found)
        for step in wanted:
            assert found[step].model.model.norm.weight.eq(step).all()
        oracle |= {step: found[step] for step in wanted}
        engines |= {id(engine) for engine in held.engines}
    assert len(engines) == 3
    reference = load_model(start)[0]
    held = HeldWeights(config, model, 2)
    for step in (1, 2, 0, 3, 4, 0):
        engine = held.use({step: paths[step]}, reference)[step]
        assert (engine.model is reference) == (step == 0)
        assert len(held.engines) <= 2


# ---- what is measured --------------------------------------------------------------------------------------


def by_hand(scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
    return outcome.scores[0] / 10, outcome.scores[1] / 10


def test_the_tables_follow_from_the_dialogues(
    start: Path, smaller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: Any, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        scores = float(rng.randrange(9)), float(rng.randrange(9))
        ratios = dict.fromkeys(("pareto", "joint_ratio", "nash_ratio"), 1.0)
        return Outcome(agreed=rng.random() < 0.5, scores=scores, metrics=ratios)

    rng, path, ratings = random.Random(0), tmp_path / "run", {POLICY: 1000.0}
    monkeypatch.setattr(GAMES["deal"], "judge", judge)
    monkeypatch.setattr(GAMES["deal"], "rewards", lambda self, scenario, outcome: by_hand(scenario, outcome))
    trainer = trained(path, load_config("deal", overrides(start, smaller, "eval.partners=[]")), keep_all=True)
    for row in selfplay(path):
        here = [d for d in dialogues(path) if d["step"] == row["step"]]
        counts = Counter(partner(d) for d in here)
        del counts["self"]
        assert {name: of["dialogues"] for name, of in row["payoff"].items()} == counts
        assert row["partners"].keys() <= SHARES.keys()
        for name, of in row["partners"].items():
            assert 9 * SHARES[name] - 1 < of["dialogues"] / 2 < 9 * SHARES[name] + 1
        scripted = [d for d in here if partner(d).startswith("scripted:")]
        if scripted:
            assert row["partners"]["scripted"]["dialogues"] == len(scripted)
        for name, of in {**row["payoff"], "self": row["partners"]["self"]}.items():
            played = [d for d in here if partner(d) == name]
            sides = [d["players"].index(POLICY) for d in played]
            assert of["agreement"] == pytest.approx(mean([d["outcome"]["agreed"] for d in played]))
            if name == "self":
                own = mean([sum(d["outcome"]["scores"]) / 2 for d in played])
                assert of["policy_points"] == of["opponent_points"] == pytest.approx(own)
                continue
            for key, other in (("policy", 0), ("opponent", 1)):
                points = [d["outcome"]["scores"][abs(s - other)] for d, s in zip(played, sides, strict=True)]
                assert of[f"{key}_points"] == pytest.approx(mean(points))
                assert of[key] == pytest.approx(mean(points) / 10)
        update_ratings(ratings, {name: of["score"] for name, of in row["payoff"].items()})
        assert row["elo"] == {name: ratings[name] for name in row["elo"]}
        ratings[f"step_{row['step'] + 1:06d}"] = ratings[POLICY]  # a snapshot's, where one is taken
    assert trainer.opponents.ratings.keys() >= {"start", "frozen"}
    assert len({*ratings.values()}) > 6
    in_report(path)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_report(path: Path) -> None:
    table, rows = gather(path)["partners"], selfplay(path)
    names = [name for name, _ in table["rows"]]
    assert {*SHARES} <= {*names}
    assert any(name.startswith("scripted:") for name in names)
    total = sum(row["partners"]["pool"]["dialogues"] for row in rows)
    reward = sum(row["partners"]["pool"]["dialogues"] * row["partners"]["pool"]["policy"] for row in rows)
    cells = dict(table["rows"])["pool"]
    assert cells[:1] + cells[2:3] == [f"{total:.0f}", f"{reward / total:.3f}"]
    html = write_report(path).read_text()
    assert "Partners in training" in html
    assert "Reward by partner" in html


def test_the_ranks_meet_whom_one_meets(tmp_path: Path) -> None:
    def play(world: Any, path: Path) -> list[dict[str, Any]]:
        mix = ["opponent.kind=mix", "opponent.mix={self = 0.5, scripted = 0.5}", "grpo.groups_per_step=6"]
        c = load_config("deal", [*RUN, *mix, "imitation.steps=0", "train.kl_every=0"])
        run = RunDir.create(path / str(world.size) / str(world.rank), c.to_toml())
        trainer = Trainer(c, run, Progress(quiet=True), threading.Event(), world)
        return [d.record(step=0) for group in trainer.play() for d in group.dialogues]

    first, second = together(lambda world: play(world, tmp_path))
    alone = play(ALONE, tmp_path)
    assert len({partner(d) for d in alone}) > 2
    assert first + second == alone


# ---- a server among others ---------------------------------------------------------------------------------


def test_a_server_that_fails_counts_against_its_own_dialogues(tiny_tokenizer: Tokenizer) -> None:
    game = GAMES["deal"]()
    rules = Rules(max_rounds=1, max_tokens_per_turn=4, max_tokens_final=4)
    engine = Engine(decoder(vocab_size=tiny_tokenizer.vocab_size, max_position_embeddings=256))
    guests = [None, Opponent(role=0, name="endpoint"), None, Opponent(role=1, name="endpoint"), None, None]
    scenarios = [game.sample(random.Random(i), "train") for i in range(len(guests))]
    for lost, share in ((2, 0.5), (1, 0.25), (3, 0.5)):
        arena = Arena(engine, tiny_tokenizer, game, rules)
        arena.speakers.outside = Mumbler({*range(1, lost + 1)})
        arena.speakers.outside.max_unscored_share = share
        if lost > share * 4:
            with pytest.raises(RuntimeError, match=r"the mumbler failed: \d of 4 dialogues are unscored"):
                arena.play(scenarios, group_size=2, seed=0, opponents=guests)
            engine.abort()
            continue
        groups = arena.play(scenarios, group_size=2, seed=0, opponents=guests)
        unscored = [g for g, group in enumerate(groups) for d in group.dialogues if d.outcome is None]
        assert len(unscored) == lost
        assert {*unscored} <= {1, 3}


# ---- resume ------------------------------------------------------------------------------------------------


def test_kill_9_and_resume_is_exact(start: Path, smaller: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints and gone on with, the frozen checkpoint moved: the same bits. Another
    checkpoint in its place is noticed, and nothing is lost.
    """
    words = overrides(start, smaller, "opponent.held=5", "eval.partners=[]")
    assert main(["train", "deal", *words, "--run-dir", str(tmp_path / "whole")]) == 0
    path = tmp_path / "run"
    command = ["train", "deal", *words, "--run-dir", str(path)]
    killed = subprocess.run([*dying(4), *command], stdout=subprocess.DEVNULL, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    before = (path / "metrics.jsonl").read_bytes()
    moved = tmp_path / "moved"
    shutil.copytree(smaller, moved)
    model, tokenizer = load_model(moved)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    save_model(model, tokenizer, tmp_path / "other")
    assert main([*command, f"opponent.path={tmp_path / 'other'}", "--resume"]) == 2
    assert (path / "metrics.jsonl").read_bytes() == before
    assert main([*command, f"opponent.path={moved}", "--resume"]) == 0
    assert lines(tmp_path / "whole") == lines(path)
    everything = [read_lines(run / "dialogues.jsonl") for run in (tmp_path / "whole", path)]
    assert everything[0] == everything[1]
    kept = [sorted(p.name for p in (run / "opponents").glob("*")) for run in (tmp_path / "whole", path)]
    # what the last checkpoint and the one before it can still meet
    assert kept[0] == kept[1] == ["step_000002", "step_000003", "step_000004", "step_000005"]


# ---- objectives --------------------------------------------------------------------------------------------

TERMS = {"joint": "cooperative", "own": "selfish", "nash": "nash"}
OUTCOMES = st.builds(
    Outcome,
    agreed=st.booleans(),
    scores=st.tuples(st.floats(-6, 30), st.floats(-6, 30)),
    metrics=st.fixed_dictionaries(
        {}, optional={key: st.floats(0, 1) for key in ("joint_ratio", "nash_ratio", "right")}
    ),
)
WEIGHTS = st.fixed_dictionaries({name: st.floats(0, 5) for name in TERMS}).filter(
    lambda weights: sum(weights.values()) > 1e-3
)


def rewarder(game: str, objective: str, **more: Any) -> Any:
    settings = from_dict({"game": {"name": game, "objective": objective, **more}}).game
    return lambda outcome: GAMES[game](settings).rewards(None, outcome)


@pytest.mark.parametrize("game", ["deal", "price", "priorities"])
@settings(max_examples=40, deadline=None)
@given(outcome=OUTCOMES, weights=WEIGHTS)
def test_a_mixed_objective_is_the_weighted_mean_of_the_others(
    game: str, outcome: Outcome, weights: dict[str, float]
) -> None:
    more = {"walk_away": 3.0} if game == "deal" else {}
    alone = {
        term: rewarder(game, name, **(more if term == "own" else {}))(outcome) for term, name in TERMS.items()
    }
    for term, reward in alone.items():
        only = {name: float(name == term) for name in TERMS}
        with_walk = more if term == "own" else {}
        assert rewarder(game, "mixed", weights=only, **with_walk)(outcome) == reward
    mixed = rewarder(game, "mixed", weights=weights, **(more if weights["own"] else {}))(outcome)
    total = sum(weights.values())
    for side in (0, 1):
        expected = math.fsum(weights[term] * alone[term][side] for term in TERMS) / total
        if weights["own"] or not more:
            assert mixed[side] == pytest.approx(expected, abs=1e-9)


def test_the_nash_term_prefers_an_even_price() -> None:
    """With half of the reward on it, the middle of the zone is best for both sides together."""
    game = GAMES["price"](
        from_dict({"game": {"name": "price", "objective": "mixed", "weights": {"joint": 1, "nash": 1}}}).game
    )
    rng = random.Random(0)
    zones = [s for s in (game.sample(rng, "train") for _ in range(40)) if s.data.zone > 1]
    for scenario in zones:
        rewards = {}
        for price in range(scenario.data.least, scenario.data.most + 1):
            outcome = game.judge(scenario, (f"price {price}", f"price {price}"))
            rewards[price] = game.rewards(scenario, outcome)
        best = max(rewards, key=lambda price: sum(rewards[price]))
        assert abs(2 * best - scenario.data.least - scenario.data.most) <= 1
        assert min(map(min, rewards.values())) == 0.5
        assert all(first == second for first, second in rewards.values())


@pytest.mark.parametrize("game", ["deal", "priorities"])
def test_a_side_envies_where_it_would_rather_have_the_others_part(game: str) -> None:
    """By counting both parts with that side's own values; without a deal nobody has a part."""
    made = GAMES[game](
        from_dict({"game": {"name": game, "objective": "mixed", "weights": {"envy_free": 1}}}).game
    )
    draws = random.Random(0)
    for _ in range(40):
        scenario = made.sample(draws, "train")
        deal = scenario.data
        taken = [draws.randint(0, count) for count in deal.counts]
        parts = taken, [count - n for count, n in zip(deal.counts, taken, strict=True)]
        stated = [" ".join(f"{item} {n}" for item, n in zip(made.items, part, strict=True)) for part in parts]
        rewards = made.rewards(scenario, made.judge(scenario, (stated[0], stated[1])))
        for side, values in enumerate(deal.values):
            worth = [sum(v * n for v, n in zip(values, part, strict=True)) for part in parts]
            assert rewards[side] == float(worth[side] >= worth[1 - side])
        assert made.rewards(scenario, made.judge(scenario, (stated[0], stated[0] + " ."))) == (1.0, 1.0)


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["game.name=price", "game.objective=mixed", "game.weights={joint = 1, envy_free = 1}"],
            r"game\.weights = .*: accepted is joint, own, nash in price",
        ),
        (["opponent.kind=mix", "opponent.mix={}"], r"opponent\.mix = \{\}: accepted is a table of shares"),
        (
            ["opponent.kind=mix", "opponent.mix={selfs = 1}"],
            r"opponent\.mix = \"selfs\": accepted is a table of shares of 'self'",
        ),
        (
            ["opponent.kind=mix", "opponent.mix={self = 1, start = -0.5}"],
            r"opponent\.mix = .*-0\.5.*: accepted is no weight below 0",
        ),
        (
            ["opponent.kind=mix", "opponent.mix={self = 0}"],
            r"opponent\.mix = .*: accepted is no weight below 0",
        ),
        (["opponent.kind=mix", "opponent.mix=self"], r"opponent\.mix = 'self': accepted is a table"),
        (["opponent.kind=mix", "opponent.mix={self = yes}"], r"opponent\.mix = .*: accepted is a table"),
        (
            ["opponent.kind=mix", "opponent.mix={frozen = 1}"],
            r"opponent\.path = \"\": accepted is a checkpoint",
        ),
        (["opponent.path=x"], r"opponent\.path = \"x\": accepted is '' where nobody is 'frozen'"),
        (
            ["opponent.kind=mix", "opponent.mix={start = 1, pool = 1}", "opponent.held=1"],
            r"opponent\.held = 1: accepted is 0, or at least 2",
        ),
        (
            ["opponent.kind=self", "opponent.held=1"],
            r"opponent\.held = 1: accepted is 0 where no other weights are held",
        ),
        (
            ["opponent.kind=scripted:nobody"],
            r"opponent\.kind = \"scripted:nobody\": accepted is scripted:NAME with NAME one of",
        ),
        (
            ["opponent.kind=mix", "opponent.mix={endpoint = 1}"],
            r"opponent\.url = \"\": accepted is an address",
        ),
        (
            ["game.objective=mixed", "game.weights={}"],
            r"game\.weights = \{\}: accepted is a table of weights",
        ),
        (
            ["game.objective=mixed", "game.weights={mine = 1}"],
            r"game\.weights = 'mine': accepted is one of 'joint', 'own', 'nash'",
        ),
        (
            ["game.objective=mixed", "game.weights={nash = 1}", "game.walk_away=2"],
            r"game\.walk_away = 2\.0: accepted is 0, or with game\.objective = 'selfish'",
        ),
    ],
)
def test_settings_are_checked(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("deal", words)


def test_shares_are_read_from_the_command_line_and_written_back() -> None:
    c = load_config("deal", ["opponent.kind=mix", 'opponent.mix={"lagged:5" = 1, self = 2, pool = 0}'])
    assert c.opponent.parts == {"lagged:5": pytest.approx(1 / 3), "self": pytest.approx(2 / 3)}
    text = c.to_toml()
    assert 'mix = {"lagged:5" = 1.0, self = 2.0, pool = 0.0}' in text
    turned = load_config("deal", ["opponent.kind=mix", 'opponent.mix={pool = 0, self = 2, "lagged:5" = 1}'])
    assert turned == c
    assert hash(turned) == hash(c)


@pytest.mark.parametrize("fault", ["tokenizer", "short", "missing"])
def test_a_frozen_checkpoint_must_fit(start: Path, tmp_path: Path, fault: str) -> None:
    tokenizer = Tokenizer.from_dir(start)
    room = 64 if fault == "short" else 400
    other = decoder(vocab_size=tokenizer.vocab_size, max_position_embeddings=room)
    save_model(other, tokenizer, tmp_path / "other")
    if fault == "tokenizer":
        path = tmp_path / "other" / "chat_template.jinja"
        path.write_text(path.read_text() + "{# another #}")
    if fault == "missing":
        (tmp_path / "other" / "config.json").unlink()
    c = load_config("deal", overrides(start, tmp_path / "other"))
    message = {
        "tokenizer": "with the policy's tokenizer",
        "short": "it has room for 64 tokens",
        "missing": "accepted is a checkpoint",
    }[fault]
    with pytest.raises(ValueError, match=rf"opponent\.path = .*other.*: .*{message}"):
        trained(tmp_path / "run", c, keep_all=True)


# ---- a best response ---------------------------------------------------------------------------------------


def by_words(self: Any, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
    """Points that every change of a word changes."""
    scores = [zlib.crc32(f"{scenario.id} {side} {finals}".encode()) % 9 for side in (0, 1)]
    ratios = dict.fromkeys(("pareto", "joint_ratio", "nash_ratio"), 1.0)
    return Outcome(agreed=True, scores=(float(scores[0]), float(scores[1])), metrics=ratios)


def test_a_best_response_is_measured_against_the_policys_own_copy(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy gains nothing, to the last word; another is trained selfishly against the policy as it is."""
    monkeypatch.setattr(GAMES["deal"], "closes", lambda self, text: True)
    monkeypatch.setattr(GAMES["deal"], "judge", by_words)
    config = load_config("deal", RUN)
    row = exploit.measured(config, start, start, 6)
    assert {value for key, value in row.items() if key.startswith("gain")} == {0.0}
    assert row["response_own"] == row["copy_own"] > 0
    path, folder = tmp_path / "run", tmp_path / "response"
    shutil.copytree(start.parent.parent, path)
    model, tokenizer = load_model(start)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    shutil.rmtree(path / "checkpoints" / "warm_start")
    save_model(model, tokenizer, path / "checkpoints" / "warm_start")
    row = exploit.exploit(path, "warm_start", 2, 3, 6, folder)
    trained = load_config(str(folder / "config.toml"))
    assert (trained.game.objective, trained.opponent.kind, trained.train.seed) == ("selfish", "frozen", 3)
    assert {partner(d) for d in dialogues(folder)} == {"frozen"}
    assert all(d["reward"] == [points / 10 for points in d["outcome"]["scores"]] for d in dialogues(folder))
    assert (row["steps"], row["seed"], row["contexts"]) == (2, 3, 6)
    assert row["response_own"] != row["copy_own"]
    assert row["gain_own"] == pytest.approx(row["response_own"] - row["copy_own"], abs=1e-3)
